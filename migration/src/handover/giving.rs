//! The source's half.

use std::io;

use super::{Handover, Token, Verdict};
use crate::record::{Record, Role};

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Giving {
    /// The guest is ours.
    Mine,
    /// The destination is ready for it. It is ours still.
    Awaited,
    /// COMMIT may have left: only the destination knows.
    Asked,
    /// It runs at the destination.
    Given,
    /// The destination will never run it: it is ours again.
    Back,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivingEvent {
    /// READY arrived.
    Ready,
    /// About to send COMMIT.
    Commit,
    /// The destination answered, to COMMIT or to a query.
    Heard(Verdict),
}

impl Giving {
    /// What `event` makes of it. Events that do not fit change nothing.
    #[must_use]
    pub fn after(self, event: GivingEvent) -> Self {
        match (self, event) {
            (Self::Mine, GivingEvent::Ready) => Self::Awaited,
            (Self::Awaited, GivingEvent::Commit) => Self::Asked,
            (Self::Asked, GivingEvent::Heard(Verdict::Running)) => Self::Given,
            (Self::Asked, GivingEvent::Heard(Verdict::Refused)) => Self::Back,
            (state, _) => state,
        }
    }

    /// Whether the guest may run at the source.
    #[must_use]
    pub fn may_run(self) -> bool {
        matches!(self, Self::Mine | Self::Awaited | Self::Back)
    }

    /// Whether the destination need not be asked any more.
    #[must_use]
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Given | Self::Back)
    }

    /// Whether a process that takes over from one that ended must find this written down. Whoever
    /// finds nothing has the guest.
    fn is_recorded(self) -> bool {
        !matches!(self, Self::Mine | Self::Awaited)
    }
}

impl Handover<Giving> {
    /// The source of `token`.
    pub fn giving(token: Token, record: Box<dyn Record>) -> Self {
        Self::new(Giving::Mine, token, record)
    }

    /// The source of `token` whose process ended after it wrote down `state`: it has no guest any
    /// more, but can ask for it.
    pub fn gave(token: Token, state: Giving, record: Box<dyn Record>) -> Self {
        Self::new(state, token, record)
    }

    /// Writes down what `event` leads to, then makes it so. On an error nothing changed, except
    /// that what the destination said is so even if nobody could write it down.
    ///
    /// The destination is told DONE, and so forgets, only where this succeeds.
    pub fn advance(&mut self, event: GivingEvent) -> io::Result<Giving> {
        let next = self.state.after(event);
        let written = match next.is_recorded() {
            true => self.change(next, Role::Source(next)),
            false => Ok(next),
        };
        if written.is_ok() || matches!(event, GivingEvent::Heard(_)) {
            self.state = next;
        }
        written
    }

    /// Forgets what is written down, if nobody needs it any more.
    pub fn settle(&mut self) {
        if self.state.is_settled() {
            self.forget();
        }
    }
}
