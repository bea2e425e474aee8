//! What can be wrong with a peer.

use std::io;
use std::time::Duration;

/// What is wrong with the peer or with the way to it. One line each: cause and remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// Something else listens there.
    #[error("the peer at {peer} is not uvmm (its first bytes were \"{first}\"): check the address")]
    NotUvmm {
        /// Its address.
        peer: String,
        /// What it said, escaped.
        first: String,
    },
    /// An uvmm from another time.
    #[error(
        "the peer at {peer} speaks the migration protocol in versions {} to {}, this uvmm in {} to \
         {}: use the same uvmm on both sides",
        theirs.0, theirs.1, ours.0, ours.1
    )]
    Version {
        /// Its address.
        peer: String,
        /// Its oldest and newest version.
        theirs: (u16, u16),
        /// Our oldest and newest version.
        ours: (u16, u16),
    },
    /// It hung up, or the network did.
    #[error("the peer at {peer} closed the connection {during}: see what it printed")]
    Closed {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
    },
    /// Nothing moves.
    #[error(
        "the peer at {peer} did not move for {:.1} s {during}: see whether it lives, and the network",
        after.as_secs_f32()
    )]
    Stalled {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
        /// How long.
        after: Duration,
    },
    /// It moves, and too slowly to be waited for.
    #[error(
        "the peer at {peer} was not done with {what} after {:.1} s {during}: see the network",
        after.as_secs_f32()
    )]
    Slow {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
        /// What it sent.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// It sends what no uvmm sends.
    #[error("the peer at {peer} sent {what} {during}: use the same uvmm on both sides")]
    Garbage {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
        /// What it sent.
        what: String,
    },
    /// It gave up and said why.
    #[error("the peer at {peer} gave up {during}: {why}")]
    GaveUp {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
        /// Its words, escaped.
        why: String,
    },
    /// The connection broke.
    #[error("the connection to the peer at {peer} broke {during}")]
    Io {
        /// Its address.
        peer: String,
        /// What was going on.
        during: &'static str,
        /// How.
        source: io::Error,
    },
    /// A message is larger than the peer would take.
    #[error("a message of {size} bytes is more than the {limit} that a peer takes")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
        /// The largest size in bytes.
        limit: usize,
    },
    /// Someone wished to stop.
    #[error("cancelled")]
    Cancelled,
}

impl PeerError {
    /// Whether nothing can be said to the peer any more.
    pub(crate) fn is_end(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Io { .. } | Self::GaveUp { .. })
    }
}
