//! The destination's half.

use std::io;

use super::{Handover, Token, Verdict};
use crate::record::{Record, Role};

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Taking {
    /// Not all is here.
    Empty,
    /// All is here and could run.
    Ready,
    /// It runs here.
    Running,
    /// It never runs here.
    Dead,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakingEvent {
    /// Everything is loaded.
    Loaded,
    /// COMMIT arrived.
    Commit,
    /// No vCPU could be started.
    CouldNotStart,
    /// Someone asks who has the guest.
    Queried,
    /// The source is lost, or we give up.
    Lost,
}

impl Taking {
    /// What `event` makes of it. Events that do not fit change nothing.
    #[must_use]
    pub fn after(self, event: TakingEvent) -> Self {
        match (self, event) {
            (Self::Empty, TakingEvent::Loaded) => Self::Ready,
            (Self::Ready, TakingEvent::Commit) => Self::Running,
            (Self::Running, TakingEvent::CouldNotStart)
            | (Self::Empty | Self::Ready, TakingEvent::Queried | TakingEvent::Lost) => Self::Dead,
            (state, _) => state,
        }
    }

    /// Whether the guest may run at the destination.
    #[must_use]
    pub fn may_run(self) -> bool {
        self == Self::Running
    }

    /// What is left of it when its process ends: a guest that had not started never will.
    #[must_use]
    pub fn after_the_end(self) -> Self {
        if self.may_run() { self } else { Self::Dead }
    }
}

impl Handover<Taking> {
    /// The destination of `token`.
    pub fn taking(token: Token, record: Box<dyn Record>) -> Self {
        Self::new(Taking::Empty, token, record)
    }

    /// The destination of `token` whose process ended after it wrote down `state`: nothing can
    /// run here, but it can be asked.
    pub fn took(token: Token, state: Taking, record: Box<dyn Record>) -> Self {
        Self::new(state.after_the_end(), token, record)
    }

    /// Writes down what `event` leads to, then makes it so. On an error nothing changed, except
    /// that whoever shall be dead is so even if nobody could write it down: a process that ends
    /// does not run the guest either.
    pub fn advance(&mut self, event: TakingEvent) -> io::Result<Taking> {
        let next = self.state.after(event);
        let changes = next != self.state;
        self.promised |= changes && next.may_run();
        let written = self.change(next, Role::Destination(next));
        if next == Taking::Dead {
            self.state = next;
            self.promised &= !(changes && written.is_ok());
        }
        written
    }

    /// Answers whoever asks about this migration. Asking decides it, before the answer is given.
    ///
    /// [`Verdict::Unknown`] only where it may be written down that the guest runs here, it does
    /// not, and that cannot be written: whoever came after this process would say another thing.
    pub fn asked(&mut self) -> Verdict {
        if let Err(error) = self.advance(TakingEvent::Queried) {
            tracing::warn!(%error, "cannot write down that the guest never runs here");
        }
        if self.state.may_run() {
            return Verdict::Running;
        }
        if self.promised {
            let dead = Role::Destination(Taking::Dead);
            self.promised = self.record.write(self.token, dead).is_err();
        }
        if self.promised { Verdict::Unknown } else { Verdict::Refused }
    }

    /// The source said DONE: nobody will ask any more.
    pub fn done(&mut self) {
        if matches!(self.state, Taking::Running | Taking::Dead) {
            self.forget();
        }
    }

    /// What a process that has ended left of `token`, a migration that is not this one.
    #[must_use]
    pub fn earlier(&self, token: Token) -> Option<Self> {
        earlier(&*self.record, token)
    }
}

/// What a process that has ended left of `token` in `record`, if it was its destination.
pub(crate) fn earlier(record: &dyn Record, token: Token) -> Option<Handover<Taking>> {
    match record.earlier(token) {
        Ok(Some((Role::Destination(state), record))) => Some(Handover::took(token, state, record)),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, %token, "cannot read what was written of a migration");
            None
        }
    }
}
