//! The way out for a guest whose memory stays where it is, and is mapped by another process.
//!
//! The destination maps the very memory that the source has, so there is nothing to copy and
//! nothing to log: whatever is written until the guest stands still is there too. Until COMMIT the
//! source may take the guest back, so until then the destination must not write to memory.

use std::io;

use super::Source;
use crate::error::Error;
use crate::guest::Departing;
use crate::patience::Cancel;
use crate::plan::Phase;
use crate::policy::Outcome;
use crate::progress::Stage;
use crate::ram::shared;
use crate::wire::{Channel, Message, PeerError, Stream};

impl<G: Departing, S: Stream, C: FnMut(&Cancel) -> io::Result<S>> Source<'_, '_, G, S, C> {
    /// SHARE, answered by PASS; then the files that are the memory.
    pub(super) fn share(&mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        if !peer.is_local() {
            return Err(unshareable("files can be passed only over a Unix socket"));
        }
        let memory = shared::files_of(self.custody.guest().ram()).map_err(Error::Unshareable)?;
        if memory.len() > peer.most_files() {
            return Err(unshareable("it is in several files, and the destination takes one"));
        }
        peer.now("before it took the memory");
        let pass = |peer: &mut Channel<S>| {
            peer.send(&Message::Share)?;
            match peer.receive_message(self.options.patience.greeting)? {
                Message::Pass => peer.pass_files(&memory),
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

fn unshareable(why: &str) -> Error {
    Error::Unshareable(io::Error::new(io::ErrorKind::Unsupported, why))
}
