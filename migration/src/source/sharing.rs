//! The way out for a guest whose memory stays where it is, and is mapped by another process.
//!
//! The destination maps the very memory that the source has, so there is nothing to copy and
//! nothing to log: whatever is written until the guest stands still is there too. Until COMMIT the
//! source may take the guest back, so until then the destination must not write to memory.

use std::io;

use super::Source;
use crate::error::Error;
use crate::guest::Departing;
use crate::plan::Phase;
use crate::policy::Outcome;
use crate::progress::Stage;
use crate::ram::shared;
use crate::wire::{Channel, Message, PeerError, Stream};

impl<G: Departing, S: Stream, C: FnMut() -> io::Result<S>> Source<'_, '_, G, S, C> {
    /// SHARE, answered by PASS; then the file that is the memory.
    pub(super) fn share(&mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        if !peer.is_local() {
            let why = "files can be passed only over a Unix socket";
            let unsupported = io::Error::new(io::ErrorKind::Unsupported, why);
            return Err(Error::Unshareable(unsupported));
        }
        let memory = shared::file_of(self.custody.guest().ram()).map_err(Error::Unshareable)?;
        peer.now("before it took the memory");
        let pass = |peer: &mut Channel<S>| {
            peer.send(&Message::Share)?;
            match peer.receive_message(self.options.patience.greeting)? {
                Message::Pass => peer.pass_file(&memory),
                other => Err(peer.unexpected(&other)),
            }
        };
        pass(peer).map_err(|error| match error {
            PeerError::Cancelled => error.into(),
            error => Error::Unshared(error),
        })
    }

    /// From running to perfectly still, with no memory to send.
    pub(super) fn stand_still(&mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        peer.now("while the guest was stopped");
        self.show(peer, Stage::Releasing);
        self.enter(peer, Phase::Precopy)?;
        self.enter(peer, Phase::Release)?;
        self.report.outcome = Some(Outcome::Converged);
        self.quiesce(peer)
    }
}
