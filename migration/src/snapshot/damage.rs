//! What can be wrong with a file that should be a snapshot.

use std::io;

use crate::error::Error;
use crate::wire::PeerError;

/// What is wrong with a snapshot, or with reading it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// Something else is in the file.
    #[error("it is no snapshot of uvmm (its first bytes are \"{first}\"): check the name")]
    NotSnapshot {
        /// Its first bytes, escaped.
        first: String,
    },
    /// A snapshot from another time.
    #[error(
        "it was written in versions {} to {} of the format, and this uvmm reads {} to {}: restore \
         it with the uvmm that wrote it", theirs.0, theirs.1, ours.0, ours.1
    )]
    Version {
        /// Its oldest and newest version.
        theirs: (u16, u16),
        /// Our oldest and newest version.
        ours: (u16, u16),
    },
    /// It ends where more should follow.
    #[error("it ends too early: it was not copied whole")]
    Cut,
    /// No uvmm wrote this.
    #[error("it is damaged: there is {what} in it")]
    Content {
        /// What it holds.
        what: String,
    },
    /// It cannot be read.
    #[error("cannot read it")]
    Unreadable(#[source] io::Error),
}

impl Damage {
    /// What an error of a connection means where there is only a file.
    pub(super) fn told(error: PeerError) -> Error {
        Error::Snapshot(match error {
            PeerError::NotUvmm { first, .. } => Self::NotSnapshot { first },
            PeerError::Version { theirs, ours, .. } => Self::Version { theirs, ours },
            PeerError::Closed { .. } => Self::Cut,
            PeerError::Garbage { what, .. } => Self::Content { what },
            PeerError::Io { source, .. } => Self::Unreadable(source),
            PeerError::GaveUp { .. } => Self::Content { what: "a farewell".into() },
            error @ (PeerError::Stalled { .. }
            | PeerError::Slow { .. }
            | PeerError::TooLarge { .. }
            | PeerError::Cancelled) => return error.into(),
        })
    }
}
