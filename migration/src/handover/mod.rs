//! Who may run the guest.
//!
//! Two small machines, one at each side, decide it. Nothing else does: the source gives the guest
//! back to its vCPUs only in a state that says so, and the destination lets it run only on the
//! one event that allows it.
//!
//! ```text
//! source        Mine ─READY─► Awaited ─commit─► Asked ──Running──► Given    destination  Empty
//! may run in:    │              │                 │                                        │loaded
//! Mine, Awaited, │              │                 └────Refused───► Back                    ▼
//! Back           └──────────────┴─ any failure: stays ours         lost, queried         Ready ──COMMIT──► Running
//!                                                                        └─────────────────┴─────► Dead ◄──┘ could not start
//! ```
//!
//! | source | it means | the guest runs here | on paper | it waits for |
//! |---|---|---|---|---|
//! | `Mine` | nothing was promised | yes | nothing | READY |
//! | `Awaited` | the destination could run it | yes | nothing | its own decision |
//! | `Asked` | COMMIT may have left | no | *asked* | RUNNING, or ANSWER to QUERY |
//! | `Given` | the destination runs it | never again | *given*, until DONE is sent | |
//! | `Back` | the destination never will | yes | *back*, until DONE is sent | |
//!
//! | destination | it means | the guest runs here | on paper | it waits for |
//! |---|---|---|---|---|
//! | `Empty` | not all is here | no | nothing | memory and state |
//! | `Ready` | all is here | no | *ready* | COMMIT |
//! | `Running` | COMMIT came | yes | *running*, until DONE comes | DONE |
//! | `Dead` | it was asked before COMMIT came, lost its source, or could not start | never | *dead*, until DONE comes | DONE |
//!
//! `Asked` is entered before the first byte of COMMIT may leave, and left only by the word of the
//! destination, which by then has made it come true. `Given`, `Running` and `Dead` are for ever.
//!
//! # What is written down
//!
//! Whatever a later process must know is in a [`Record`] before it is acted on:
//! - *asked* before COMMIT leaves: a source that finds it after a crash asks before it boots the
//!   guest again ([`record::may_boot`](crate::record::may_boot));
//! - *ready* before READY leaves: a destination that finds it after a crash knows that the guest
//!   never ran there, since *running* was not written, and says so;
//! - *running* before the first vCPU runs, *dead* before anyone is told;
//! - what the source heard, before it says DONE, upon which the destination forgets.
//!
//! A destination that finds nothing about a token says *unknown*, which decides nothing: it may be
//! another destination.
//!
//! A model check runs these machines, with their records, through every order of events, lost,
//! repeated and late messages, full disks and crashes: see `handover/model.rs`.

mod giving;
#[cfg(test)]
mod model;
mod taking;
mod token;

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::record::{Record, Role};

pub use giving::{Giving, GivingEvent};
pub(crate) use taking::earlier;
pub use taking::{Taking, TakingEvent};
pub use token::Token;

/// What a destination says when it is asked who has the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// It runs here.
    Running,
    /// It never runs here.
    Refused,
    /// No migration of that name is known here. Says nothing about the guest.
    Unknown,
}

/// A half that is written down before it changes.
pub struct Handover<T> {
    state: T,
    token: Token,
    record: Box<dyn Record>,
    /// Whether it may be on paper that the guest runs here.
    promised: bool,
}

impl<T: fmt::Debug> fmt::Debug for Handover<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handover").field(&self.state).field(&self.token).finish()
    }
}

impl<T: Copy + PartialEq> Handover<T> {
    fn new(state: T, token: Token, record: Box<dyn Record>) -> Self {
        Self { state, token, record, promised: false }
    }

    /// Where it is now.
    #[must_use]
    pub fn state(&self) -> T {
        self.state
    }

    /// Which migration this is.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    fn change(&mut self, next: T, role: Role) -> io::Result<T> {
        if next != self.state {
            self.record.write(self.token, role)?;
            self.state = next;
        }
        Ok(next)
    }

    fn forget(&mut self) {
        if let Err(error) = self.record.forget(self.token) {
            tracing::warn!(%error, token = %self.token, "what was written of a migration stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::NoRecord;

    #[test]
    fn nobody_is_left_undecided_who_can_ask() {
        for destination in [Taking::Empty, Taking::Ready, Taking::Running, Taking::Dead] {
            let mut there = Handover::took(token(), destination, Box::new(NoRecord));
            let source = Giving::Asked.after(GivingEvent::Heard(there.asked()));
            assert!(source.is_settled());
        }
    }

    #[test]
    fn a_destination_that_knows_nothing_decides_nothing() {
        let asked = Giving::Asked.after(GivingEvent::Heard(Verdict::Unknown));
        assert_eq!(asked, Giving::Asked);
    }

    #[test]
    fn nothing_is_given_to_a_destination_that_is_not_ready() {
        assert_eq!(Giving::Mine.after(GivingEvent::Commit), Giving::Mine);
        assert_eq!(Taking::Empty.after(TakingEvent::Commit), Taking::Empty);
    }

    struct FullDisk;

    impl Record for FullDisk {
        fn write(&mut self, _: Token, _: Role) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn forget(&mut self, _: Token) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn earlier(&self, _: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
            Ok(None)
        }
    }

    fn token() -> Token {
        Token::random().unwrap()
    }

    #[test]
    fn what_cannot_be_written_down_does_not_happen() {
        let mut source = Handover::giving(token(), Box::new(FullDisk));
        source.advance(GivingEvent::Ready).unwrap();
        source.advance(GivingEvent::Commit).unwrap_err();
        assert_eq!(source.state(), Giving::Awaited);
        let mut destination = Handover::new(Taking::Ready, token(), Box::new(FullDisk));
        destination.advance(TakingEvent::Commit).unwrap_err();
        assert_eq!(destination.state(), Taking::Ready);
        destination.advance(TakingEvent::Lost).unwrap_err();
        assert_eq!(destination.state(), Taking::Dead);
        assert_eq!(destination.asked(), Verdict::Unknown, "running may be on paper");
    }
}
