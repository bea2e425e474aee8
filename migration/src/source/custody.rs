//! A guest that is on its way, and runs on here if it does not get there.

use std::io;

use crate::guest::Departing;
use crate::handover::{Giving, GivingEvent, Handover, Token};
use crate::record::Record;

/// Holds a guest during its migration. Dropping it takes everything back, if the guest is ours.
pub(super) struct Custody<'a, G: Departing> {
    guest: &'a mut G,
    /// None until the guest is given away.
    handover: Option<Handover<Giving>>,
}

impl<'a, G: Departing> Custody<'a, G> {
    pub(super) fn of(guest: &'a mut G) -> Self {
        Self { guest, handover: None }
    }

    pub(super) fn guest(&mut self) -> &mut G {
        self.guest
    }

    /// Writes down that the guest is given away. If that succeeds, COMMIT may leave, and dropping
    /// this does not resume the guest any more.
    pub(super) fn give(&mut self, token: Token, record: Box<dyn Record>) -> io::Result<()> {
        let mut handover = Handover::giving(token, record);
        let given = handover.advance(GivingEvent::Commit);
        self.handover = Some(handover);
        given.map(|_| ())
    }

    /// Takes the word of the destination.
    pub(super) fn heard(&mut self, event: GivingEvent) -> Giving {
        let Some(handover) = &mut self.handover else { return Giving::Mine };
        if let Err(error) = handover.advance(event) {
            tracing::warn!(%error, "cannot write down who has the guest");
        }
        handover.state()
    }
}

impl<G: Departing> Drop for Custody<'_, G> {
    fn drop(&mut self) {
        self.guest.dirty().stop();
        if self.handover.as_ref().is_none_or(|handover| handover.state().may_run()) {
            self.guest.plan().undo();
        }
    }
}
