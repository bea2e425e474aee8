//! How it is known what a guest writes while it is migrated.

use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

/// How KVM tells which pages vCPUs write while their guest is migrated. A choice of this host's:
/// the guest sees nothing of it.
///
/// The log is the default because rings are hardly faster: with them a guest of 1 GiB took 0.96 of
/// the time, and one that rewrites 64 MiB all the time 0.88 (medians of five, on a machine with two
/// processors where those of one kind differ by as much; `cargo lab bench migration` measures it).
/// Every KVM has the log, it starts without protecting any memory, and it cannot overflow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyTracking {
    /// One bitmap of all memory, which is read as a whole.
    #[default]
    Log,
    /// A ring for each vCPU, with an entry for each page that it wrote: so it is known who writes
    /// how much, and only they are slowed down where that must be.
    Ring,
}

/// There is no such way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("it is log or ring")]
pub struct NoSuchTracking;

impl FromStr for DirtyTracking {
    type Err = NoSuchTracking;

    fn from_str(text: &str) -> Result<Self, NoSuchTracking> {
        match text {
            "log" => Ok(Self::Log),
            "ring" => Ok(Self::Ring),
            _ => Err(NoSuchTracking),
        }
    }
}
