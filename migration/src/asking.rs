//! Asking who has the guest.

use std::io;

use crate::error::Error;
use crate::handover::{Giving, GivingEvent, Handover, Token, Verdict};
use crate::patience::{Cancel, Patience};
use crate::wire::{Channel, Message, Stream};

/// Asks, for a source whose process has ended, the destination that `connect` connects to; writes
/// down what it says. Gives [`Giving::Asked`] where nobody there knows of the migration.
pub fn ask<S: Stream>(
    handover: &mut Handover<Giving>,
    connect: impl FnOnce() -> io::Result<S>,
    patience: &Patience,
) -> Result<Giving, Error> {
    let stream = connect().map_err(Error::Connect)?;
    let (verdict, mut peer) = query(stream, handover.token(), patience, Cancel::new())?;
    Ok(hear(handover, verdict, &mut peer))
}

/// QUERY, and the answer. [`hear`] ends that conversation.
pub(crate) fn query<S: Stream>(
    stream: S,
    token: Token,
    patience: &Patience,
    cancel: Cancel,
) -> Result<(Verdict, Channel<S>), Error> {
    let limit = patience.greeting;
    let mut peer = Channel::new(stream, limit, cancel)?;
    peer.greet(limit)?;
    peer.now("before it said who has the guest");
    peer.send(&Message::Query(token))?;
    match peer.receive_message(limit)? {
        Message::Answer(verdict) => Ok((verdict, peer)),
        other => Err(peer.unexpected(&other).into()),
    }
}

/// Takes the word of the destination, and lets it forget once that is written down.
pub(crate) fn hear<S: Stream>(
    handover: &mut Handover<Giving>,
    verdict: Verdict,
    peer: &mut Channel<S>,
) -> Giving {
    match handover.advance(GivingEvent::Heard(verdict)) {
        Ok(state) if state.is_settled() => {
            // Unheard, it does no harm: the destination stops listening in time.
            let _unheard = peer.send(&Message::Done(handover.token()));
            handover.settle();
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot write down who has the guest"),
    }
    handover.state()
}
