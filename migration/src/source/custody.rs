//! A guest that is on its way, and runs on here if it does not get there.

use std::io;

use crate::asking::hear;
use crate::guest::Departing;
use crate::handover::{Giving, GivingEvent, Handover, Token, Verdict};
use crate::policy::Shares;
use crate::record::Record;
use crate::wire::{Channel, Stream};

/// Holds a guest during its migration. Dropping it takes everything back, if the guest is ours.
pub(super) struct Custody<'a, G: Departing> {
    guest: &'a mut G,
    /// None until the destination has a name for it, and so long the guest is ours.
    handover: Option<Handover<Giving>>,
}

impl<'a, G: Departing> Custody<'a, G> {
    pub(super) fn of(guest: &'a mut G) -> Self {
        Self { guest, handover: None }
    }

    pub(super) fn guest(&mut self) -> &mut G {
        self.guest
    }

    /// The destination is ready.
    pub(super) fn ready(&mut self, token: Token, record: Box<dyn Record>) -> io::Result<()> {
        self.handover.insert(Handover::giving(token, record)).advance(GivingEvent::Ready)?;
        Ok(())
    }

    /// Writes down that the guest is given away. If that succeeds, COMMIT may leave, and dropping
    /// this does not resume the guest any more.
    pub(super) fn give(&mut self) -> io::Result<()> {
        let handover = self.handover.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        match handover.advance(GivingEvent::Commit)? {
            Giving::Asked => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Takes the word of the destination, and lets it forget.
    pub(super) fn heard<S: Stream>(&mut self, verdict: Verdict, peer: &mut Channel<S>) -> Giving {
        let Some(handover) = &mut self.handover else { return Giving::Mine };
        hear(handover, verdict, peer)
    }
}

impl<G: Departing> Drop for Custody<'_, G> {
    fn drop(&mut self) {
        self.guest.dirty().stop();
        self.guest.throttle(&Shares::NONE);
        if self.handover.as_ref().is_none_or(|handover| handover.state().may_run()) {
            self.guest.plan().undo();
        }
    }
}
