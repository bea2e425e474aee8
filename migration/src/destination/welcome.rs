//! Whoever connects, until someone brings a guest.

use std::time::Instant;

use super::Arrival;
use crate::answering::answer_for;
use crate::compat::{Mismatch, Offer};
use crate::error::{Error, one_line};
use crate::guest::{Arriving, Host};
use crate::handover::{Token, earlier};
use crate::patience::{Patience, TICK};
use crate::progress::Watch;
use crate::ram;
use crate::wire::{Channel, Door, Lanes, Listener, MOST_STREAMS, Message, Received};

/// How many mismatches are told at most.
const TOLD: usize = 1000;

/// Greets, answers offers, and gives the first arrival whose memory begins to flow.
pub(super) fn welcome<'a, 'w, H: Host, L: Listener>(
    host: &mut H,
    listener: &L,
    patience: &'a Patience,
    watch: &'a mut Watch<'w>,
) -> Result<Arrival<'a, 'w, L::Stream, H::Guest>, Error> {
    loop {
        let stream = connection(listener, watch)?;
        match meet(host, stream, listener, patience, watch) {
            Ok(Some(Met { peer, lanes, guest, token, first })) => {
                let (first, started) = (Some(first), Instant::now());
                return Ok(Arrival { peer, lanes, guest, token, first, patience, watch, started });
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(error = one_line(&error), "someone came to nothing"),
        }
    }
}

fn connection<L: Listener>(listener: &L, watch: &Watch<'_>) -> Result<L::Stream, Error> {
    loop {
        if watch.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if let Some(stream) = listener.accept(TICK).map_err(Error::Listen)? {
            return Ok(stream);
        }
    }
}

type MetAt<L, H> = Met<<L as Listener>::Stream, <H as Host>::Guest>;

/// A guest that begins to flow.
struct Met<S, G> {
    peer: Channel<S>,
    lanes: Lanes<S>,
    guest: G,
    token: Token,
    first: Received,
}

/// One connection: a guest that begins to flow, or nothing.
fn meet<H: Host, L: Listener>(
    host: &mut H,
    stream: L::Stream,
    listener: &L,
    patience: &Patience,
    watch: &Watch<'_>,
) -> Result<Option<MetAt<L, H>>, Error> {
    let mut peer = Channel::new(stream, patience.silence, watch.cancel.clone())?;
    peer.answer_greeting(patience.greeting)?;
    peer.now("before it made an offer");
    let (offer, dry_run, streams) = match peer.receive_message(patience.greeting)? {
        Message::Offer { streams, .. } if !(1..=MOST_STREAMS).contains(&streams) => {
            return Err(peer.garbage(format!("an offer of {streams} connections")).into());
        }
        Message::Offer { offer, dry_run, streams } => (offer, dry_run, streams),
        Message::Query(token) => {
            let earlier = earlier(&*watch.record, token);
            answer_for(earlier, token, &mut peer, patience.greeting)?;
            return Ok(None);
        }
        other => return Err(peer.unexpected(&other).into()),
    };
    let guest = match prepare(host, &offer) {
        Ok(guest) => guest,
        Err(mut mismatches) => {
            mismatches.truncate(TOLD);
            tracing::warn!(name = offer.name, "a guest does not fit: {}", mismatches[0]);
            peer.send(&Message::Mismatched(mismatches))?;
            return Ok(None);
        }
    };
    let token = Token::random().map_err(Error::Random)?;
    peer.send(&Message::Accepted(token))?;
    if dry_run {
        return Ok(None);
    }
    let door = Door { listener, token, cancel: &watch.cancel, silence: patience.silence };
    let lanes = door.admit(&mut peer, streams, patience.greeting)?;
    peer.now("before it sent memory");
    let first = loop {
        match peer.receive(patience.silence)? {
            Received::Message(Message::Alive) => {}
            first => break first,
        }
    };
    match first {
        first @ (Received::Ram { .. } | Received::Zero(_)) => {
            Ok(Some(Met { peer, lanes, guest, token, first }))
        }
        Received::Message(other) => Err(peer.unexpected(&other).into()),
        Received::State(_) => Err(peer.garbage("state".into()).into()),
    }
}

/// Has the machine built, and makes sure that its memory is what was offered.
pub(crate) fn prepare<H: Host>(host: &mut H, offer: &Offer) -> Result<H::Guest, Vec<Mismatch>> {
    let guest = host.prepare(offer)?;
    let layout = ram::layout(guest.ram());
    if layout == offer.ram {
        return Ok(guest);
    }
    let told = |layout: &[(u64, u64)]| {
        let region = |(start, len): &(u64, u64)| format!("{len:#x} bytes at {start:#x}");
        layout.iter().take(8).map(region).collect::<Vec<_>>().join(", ")
    };
    Err(vec![Mismatch {
        path: "memory".into(),
        wanted: told(&offer.ram),
        found: told(&layout),
        remedy: "use the same uvmm on both sides".into(),
    }])
}
