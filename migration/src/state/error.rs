//! Why a state could not be written or read.

use std::borrow::Cow;
use std::error::Error;

use super::Saved;

/// Why a state could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The list of sections is cut short, or its bytes make no sense.
    #[error("state is damaged at byte {at}: {why}")]
    Damaged {
        /// Offset into the state.
        at: usize,
        /// What is wrong there.
        why: &'static str,
    },
    /// A section is not what was sent.
    #[error("state of {instance} ({kind}) has a wrong checksum: migrate again")]
    Checksum {
        /// Kind of the section, as received.
        kind: String,
        /// Owner of the section, as received.
        instance: String,
    },
    /// Something is larger than any honest one.
    #[error("state of {what} takes {size} bytes, more than the {limit} allowed")]
    TooLarge {
        /// The section or list.
        what: String,
        /// Its size in bytes.
        size: usize,
        /// The largest size in bytes.
        limit: usize,
    },
    /// Two sections have the same kind and owner.
    #[error("state of {instance} holds {kind} twice")]
    Twice {
        /// Kind of the sections.
        kind: String,
        /// Owner of the sections.
        instance: String,
    },
    /// The other side did not save what this side is made of.
    #[error("state of {instance} lacks {kind}: start both sides with the same devices")]
    Missing {
        /// Kind of the section.
        kind: &'static str,
        /// Owner of the section.
        instance: String,
    },
    /// The other side saved what nothing here took.
    #[error("nothing here takes the state of {list}: start both sides with the same devices")]
    Unread {
        /// The sections, as `instance (kind)`.
        list: String,
    },
    /// The other side speaks another version of a format.
    #[error("{kind} is saved in version {found}, but only {wanted} is known: use the same uvmm")]
    Version {
        /// The format.
        kind: &'static str,
        /// The version received.
        found: u16,
        /// The newest version known here.
        wanted: u16,
    },
    /// The payload of a section does not decode.
    #[error("saved {kind} does not decode")]
    Payload {
        /// The format.
        kind: &'static str,
        /// Why not.
        source: postcard::Error,
    },
    /// The payload decodes to something that cannot be.
    #[error("saved {kind} cannot be: {why}")]
    Invalid {
        /// The format.
        kind: &'static str,
        /// What cannot be.
        why: Cow<'static, str>,
    },
    /// The owner could not read or write its own state, such as a refused ioctl.
    #[error("cannot {what}")]
    Owner {
        /// What it tried, such as `set the local APIC`.
        what: Cow<'static, str>,
        /// Why not.
        source: Box<dyn Error + Send + Sync>,
    },
    /// An error with the owner that it belongs to.
    #[error("{instance}")]
    At {
        /// The owner.
        instance: String,
        /// What went wrong.
        source: Box<StateError>,
    },
}

impl StateError {
    /// A `T` was decoded, but `why` says that it cannot be.
    pub fn invalid<T: Saved>(why: impl Into<Cow<'static, str>>) -> Self {
        Self::Invalid { kind: T::KIND, why: why.into() }
    }

    /// The owner of a state tried `what` and got `source`.
    pub fn owner(
        what: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self::Owner { what: what.into(), source: source.into() }
    }
}
