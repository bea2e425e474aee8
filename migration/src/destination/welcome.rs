//! Whoever connects, until someone brings a guest.

use std::fs::File;
use std::time::Instant;

use super::Arrival;
use crate::answering::answer_for;
use crate::compat::{Mismatch, Offer};
use crate::error::{Error, one_line};
use crate::guest::{Arriving, Host};
use crate::handover::{Token, earlier};
use crate::patience::{Patience, TICK};
use crate::progress::Watch;
use crate::ram::{self, shared};
use crate::wire::{
    Channel, Door, Lanes, Listener, Lobby, MOST_STREAMS, Message, PeerError, Received, Said, Stream,
};

/// How many mismatches are told at most.
const TOLD: usize = 1000;

/// Greets, answers offers, and gives the first arrival whose memory begins to flow.
pub(super) fn welcome<'a, 'w, H: Host, L: Listener>(
    host: &mut H,
    listener: &L,
    patience: &'a Patience,
    watch: &'a mut Watch<'w>,
) -> Result<Arrival<'a, 'w, L::Stream, H::Guest>, Error>
where
    L::Stream: 'static,
{
    let Patience { greeting, silence, .. } = *patience;
    let mut lobby = Lobby::new(listener, greeting, silence, watch.cancel.clone());
    loop {
        let said = someone(&mut lobby, watch)?;
        match meet(host, said, &mut lobby, patience, watch) {
            Ok(Some(Met { peer, lanes, guest, token, first, shared })) => {
                return Ok(Arrival {
                    peer,
                    lanes,
                    guest,
                    token,
                    first: Some(first),
                    shared,
                    patience,
                    watch,
                    started: Instant::now(),
                });
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(error = one_line(&error), "someone came to nothing"),
        }
    }
}

fn someone<L: Listener>(
    lobby: &mut Lobby<'_, L>,
    watch: &Watch<'_>,
) -> Result<Said<L::Stream>, Error>
where
    L::Stream: 'static,
{
    loop {
        if watch.cancel.is_cancelled() {
            return Err(watch.cancel.error());
        }
        if let Some(said) = lobby.next(TICK).map_err(Error::Listen)? {
            return Ok(said);
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
    shared: bool,
}

/// Someone and what they want: a guest that begins to flow, or nothing.
fn meet<H: Host, L: Listener>(
    host: &mut H,
    (mut peer, message): Said<L::Stream>,
    lobby: &mut Lobby<'_, L>,
    patience: &Patience,
    watch: &Watch<'_>,
) -> Result<Option<MetAt<L, H>>, Error>
where
    L::Stream: 'static,
{
    let asked = asked(&mut peer, message, patience, watch)?;
    let Some(Asked { offer, dry_run, streams, memory }) = asked else { return Ok(None) };
    let shared = memory.is_some();
    let guest = match prepare(host, &offer, memory) {
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
    let door = Door { lobby, token, cancel: &watch.cancel };
    let lanes = door.admit(&mut peer, streams, patience.greeting)?;
    let first = match first(&mut peer, patience) {
        Err(PeerError::Cancelled) => {
            peer.give_up(&one_line(&watch.cancel.error()));
            return Err(PeerError::Cancelled.into());
        }
        first => first?,
    };
    match (first, shared) {
        (first @ (Received::Ram { .. } | Received::Zero(_)), false)
        | (first @ Received::State(_), true) => {
            Ok(Some(Met { peer, lanes, guest, token, first, shared }))
        }
        // The others were quicker, and left nothing to this connection.
        (first @ Received::Message(Message::RoundEnd), false) if streams > 1 => {
            Ok(Some(Met { peer, lanes, guest, token, first, shared }))
        }
        (Received::Message(other), _) => Err(peer.unexpected(&other).into()),
        (Received::State(_), false) => Err(peer.garbage("state".into()).into()),
        (_, true) => Err(peer.garbage("memory that it shares".into()).into()),
    }
}

/// What comes first of a guest, once its source has prepared it.
fn first<S: Stream>(peer: &mut Channel<S>, patience: &Patience) -> Result<Received, PeerError> {
    peer.now("before it sent memory");
    loop {
        match peer.receive(patience.silence)? {
            Received::Message(Message::Alive) => {}
            first => return Ok(first),
        }
    }
}

/// What someone would like to bring.
struct Asked {
    offer: Offer,
    dry_run: bool,
    streams: u8,
    /// The memory itself, where it is shared. Not checked.
    memory: Option<Vec<File>>,
}

/// What whoever connected wants, who said `message` first: nothing if it was answered.
fn asked<S: Stream>(
    peer: &mut Channel<S>,
    mut message: Message,
    patience: &Patience,
    watch: &Watch<'_>,
) -> Result<Option<Asked>, Error> {
    peer.now("before it made an offer");
    let mut memory = None;
    if message == Message::Share {
        if !peer.is_local() {
            peer.give_up("memory is shared only over a Unix socket");
            return Ok(None);
        }
        memory = Some(peer.take_files(patience.greeting)?);
        message = peer.receive_message(patience.greeting)?;
    }
    let most = if memory.is_some() { 1 } else { MOST_STREAMS };
    match message {
        Message::Offer { streams, .. } if !(1..=most).contains(&streams) => {
            Err(peer.garbage(format!("an offer of {streams} connections")).into())
        }
        Message::Offer { offer, dry_run, streams } => {
            Ok(Some(Asked { offer, dry_run, streams, memory }))
        }
        Message::Query(token) => {
            let earlier = earlier(&*watch.record, token);
            answer_for(earlier, token, peer, patience.greeting)?;
            Ok(None)
        }
        other => Err(peer.unexpected(&other).into()),
    }
}

/// Has the machine built, and makes sure that its memory is what was offered.
pub(crate) fn prepare<H: Host>(
    host: &mut H,
    offer: &Offer,
    memory: Option<Vec<File>>,
) -> Result<H::Guest, Vec<Mismatch>> {
    if let Some(memory) = &memory {
        shared::check(memory, offer)?;
    }
    let guest = host.prepare(offer, memory)?;
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
