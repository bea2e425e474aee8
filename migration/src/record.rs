//! Decisions about who may run, written down before they are acted on.

mod file;

use std::io;

pub use file::{About, FileRecord, Side, Written};

use crate::handover::{Giving, Taking, Token};

/// Where one side of a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// We had the guest.
    Source(Giving),
    /// We shall have it.
    Destination(Taking),
}

impl Role {
    /// Whether nothing can come of it any more that anyone would have to decide.
    #[must_use]
    pub fn is_settled(self) -> bool {
        match self {
            Self::Source(state) => state.is_settled(),
            Self::Destination(state) => state == state.after_the_end(),
        }
    }
}

/// Whether a guest may be booted again about which processes that ended wrote `roles`: not if it
/// was given away, as far as anyone knows here.
#[must_use]
pub fn may_boot(roles: impl IntoIterator<Item = Role>) -> bool {
    let away = |role| matches!(role, Role::Source(Giving::Asked | Giving::Given));
    !roles.into_iter().any(away)
}

/// Somewhere to write decisions down, such that they survive the process.
pub trait Record: Send {
    /// Returns only when `role` is on stable storage, in place of what was there for `token`. On
    /// an error it may be there all the same.
    fn write(&mut self, token: Token, role: Role) -> io::Result<()>;

    /// Removes what is there for `token`: nobody needs it any more.
    fn forget(&mut self, token: Token) -> io::Result<()>;

    /// What a process that has ended wrote about `token`, and the way to write on there. None if
    /// there is nothing, or if that process lives and can speak for itself.
    fn earlier(&self, token: Token) -> io::Result<Option<(Role, Box<dyn Record>)>>;
}

/// Writes nothing down: whoever cannot ask this process will not know.
#[derive(Debug, Default)]
pub struct NoRecord;

impl Record for NoRecord {
    fn write(&mut self, _: Token, _: Role) -> io::Result<()> {
        Ok(())
    }

    fn forget(&mut self, _: Token) -> io::Result<()> {
        Ok(())
    }

    fn earlier(&self, _: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
        Ok(None)
    }
}
