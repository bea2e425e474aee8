//! How long to wait for the other side, and being told to stop waiting.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::Error;

/// How long to wait for the other side. No wait is without a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a greeting, and for an operator's own network: connecting.
    pub greeting: Duration,
    /// For the destination to build the machine and answer the offer.
    pub prepare: Duration,
    /// For a byte of a transfer that goes on, and once more for all of the state, with a second for
    /// each MiB of it, and for the other connections to end when it came; also for the destination
    /// to load the state, and for the source to get through its steps.
    pub silence: Duration,
    /// For all of it, once the guest is stopped and until the destination is ready.
    pub stopped: Duration,
    /// For the answer to COMMIT, before asking on another connection.
    pub running: Duration,
    /// For the guest to have its assigned devices back, before the report is written without that.
    pub settling: Duration,
    /// For asking, before the migration is called undecided.
    pub asking: Duration,
    /// For being asked, once decided. More than `asking` of the peer.
    pub answering: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            greeting: seconds(10),
            prepare: seconds(60),
            silence: seconds(30),
            stopped: seconds(300),
            running: seconds(5),
            settling: seconds(60),
            asking: seconds(60),
            answering: seconds(120),
        }
    }
}

/// A wish to stop, shared by whoever may have it and whoever must heed it.
///
/// Heeded at every frame, and every [`TICK`] while blocked.
#[derive(Clone, Debug)]
pub struct Cancel(Vec<Arc<OnceLock<Wish>>>);

/// Why someone wishes to stop.
#[derive(Clone, Debug)]
enum Wish {
    /// That is theirs to know.
    Cancel,
    /// What was offered is no longer to be had.
    Withdraw(String),
}

/// How often a blocked wait looks up.
pub const TICK: Duration = Duration::from_millis(50);

impl Cancel {
    /// Nobody wishes to stop yet.
    #[must_use]
    pub fn new() -> Self {
        Self(vec![Arc::default()])
    }

    /// Wishes to stop. Heeded until the guest is given away; then it is too late.
    pub fn cancel(&self) {
        self.wish(&Wish::Cancel);
    }

    /// The same, because of something that the other side is to hear as well. The first to wish
    /// gives the reason.
    pub fn withdraw(&self, why: String) {
        self.wish(&Wish::Withdraw(why));
    }

    fn wish(&self, wish: &Wish) {
        for place in &self.0 {
            let _second = place.set(wish.clone());
        }
    }

    /// Whether someone wishes to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.iter().any(|wish| wish.get().is_some())
    }

    /// What a migration stops with that someone wishes to stop.
    pub(crate) fn error(&self) -> Error {
        match self.0.iter().find_map(|wish| wish.get()) {
            Some(Wish::Withdraw(why)) => Error::Withdrawn(why.clone()),
            _ => Error::Cancelled,
        }
    }

    /// A wish of whoever wishes this or `other`.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self(self.0.iter().chain(&other.0).cloned().collect())
    }
}

impl Default for Cancel {
    fn default() -> Self {
        Self::new()
    }
}
