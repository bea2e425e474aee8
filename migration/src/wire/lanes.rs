//! More connections than the first, over which memory flows.
//!
//! ```text
//! source   HELLO, JOIN(token, lane) ──► destination      on a connection of its own
//!                                ◄────  JOINED
//!          memory, ROUND END ────────►                   each pass over memory
//!          memory, END(totals) ──────►                   the last one
//! ```
//!
//! Lane 0 is the connection that the migration was agreed on; the others have numbers from 1 on.
//! Only who knows the token may join, once for each number. Whichever breaks, breaks all.

use std::time::{Duration, Instant};

use super::{Channel, Listener, Lobby, Message, PeerError, Said, Stream, Totals};
use crate::error::Error;
use crate::handover::{Token, Verdict};
use crate::patience::{Cancel, TICK};
use crate::report::Report;

/// The most connections of a migration, the first included.
pub const MOST_STREAMS: u8 = 16;

/// The connections of a migration besides its first.
pub(crate) struct Lanes<S> {
    channels: Vec<Channel<S>>,
    /// Set as soon as one of them breaks, heeded by all.
    pub(crate) broken: Cancel,
}

/// What all connections of a migration carried together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carried {
    /// In both directions.
    pub(crate) bytes: u64,
    /// Bytes per second, if enough to tell.
    pub(crate) rate: Option<f64>,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
}

impl Carried {
    /// Puts it into `report`.
    pub(crate) fn account(&self, report: &mut Report) {
        report.bytes_sent = self.bytes;
        report.throughput_mib_s = self.rate.unwrap_or(0.0) / f64::from(1 << 20);
        (report.pages, report.zero_pages) = (self.pages, self.zero_pages);
    }
}

impl<S: Stream> Lanes<S> {
    /// None besides the first.
    pub(crate) fn new() -> Self {
        Self { channels: Vec::new(), broken: Cancel::new() }
    }

    pub(crate) fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut Channel<S>> {
        self.channels.iter_mut()
    }

    /// Has all of them, and `first`, heed `cancel` and the break of any.
    pub(crate) fn bind(&mut self, first: &mut Channel<S>, cancel: &Cancel) {
        for channel in self.channels.iter_mut().chain([first]) {
            channel.set_cancel(cancel.or(&self.broken));
        }
    }

    /// What they and `first` carried.
    pub(crate) fn carried(&self, first: &Channel<S>) -> Carried {
        let all = || self.channels.iter().chain([first]);
        let rates: Vec<_> = all().filter_map(Channel::rate).collect();
        Carried {
            bytes: all().map(Channel::bytes).sum(),
            rate: (!rates.is_empty()).then(|| rates.iter().sum()),
            pages: all().map(|channel| channel.totals().pages).sum(),
            zero_pages: all().map(|channel| channel.totals().zero_pages).sum(),
        }
    }

    /// At the source: joins `token` over `channel`, which was greeted, as the next lane.
    pub(crate) fn join(
        &mut self,
        mut channel: Channel<S>,
        token: Token,
        limit: Duration,
    ) -> Result<(), PeerError> {
        let lane = u8::try_from(self.channels.len() + 1).expect("there are few lanes");
        channel.now("while it was asked for another connection");
        channel.send(&Message::Join { token, lane })?;
        match channel.receive_message(limit)? {
            Message::Joined => {}
            other => return Err(channel.unexpected(&other)),
        }
        channel.now("while it was sent memory");
        self.channels.push(channel);
        Ok(())
    }

    /// At the source: tells `message` over all of them.
    pub(crate) fn tell(
        &mut self,
        mut message: impl FnMut(Totals) -> Message,
    ) -> Result<(), PeerError> {
        self.channels.iter_mut().try_for_each(|lane| lane.send(&message(lane.totals())))
    }
}

/// At the destination: whoever connects, until all lanes of a migration have joined.
pub(crate) struct Door<'a, 'l, L: Listener> {
    pub(crate) lobby: &'a mut Lobby<'l, L>,
    pub(crate) token: Token,
    pub(crate) cancel: &'a Cancel,
}

impl<L: Listener> Door<'_, '_, L>
where
    L::Stream: 'static,
{
    /// Waits at most `limit` until `streams` connections, `first` included, are there.
    pub(crate) fn admit(
        self,
        first: &mut Channel<L::Stream>,
        streams: u8,
        limit: Duration,
    ) -> Result<Lanes<L::Stream>, Error> {
        first.now("before all of its connections came");
        let (start, mut seats) = (Instant::now(), Vec::new());
        seats.resize_with(usize::from(streams.saturating_sub(1)), || None);
        while seats.iter().any(Option::is_none) {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if start.elapsed() >= limit {
                return Err(first.stalled(start.elapsed()).into());
            }
            if let Some(said) = self.lobby.next(TICK).map_err(Error::Listen)?
                && let Err(error) = self.seat(said, &mut seats)
            {
                tracing::warn!(%error, "someone who is no part of the migration connected");
            }
        }
        let mut lanes =
            Lanes { channels: seats.into_iter().flatten().collect(), broken: Cancel::new() };
        lanes.bind(first, self.cancel);
        Ok(lanes)
    }

    /// One connection: a lane that takes its seat, or nothing.
    fn seat(
        &self,
        (mut peer, message): Said<L::Stream>,
        seats: &mut [Option<Channel<L::Stream>>],
    ) -> Result<(), PeerError> {
        let lane = match message {
            Message::Join { token, lane } if token == self.token => usize::from(lane),
            Message::Join { .. } => {
                peer.give_up("no migration of that name is known here");
                return Ok(());
            }
            Message::Query(_) => return peer.send(&Message::Answer(Verdict::Unknown)),
            Message::Offer { .. } => {
                peer.give_up("another guest is about to arrive here: choose another destination");
                return Ok(());
            }
            other => return Err(peer.unexpected(&other)),
        };
        match lane.checked_sub(1).and_then(|index| seats.get_mut(index)) {
            Some(seat @ None) => {
                peer.send(&Message::Joined)?;
                peer.now("while it sent memory");
                *seat = Some(peer);
            }
            _ => peer.give_up("that connection is there already, or was not agreed on"),
        }
        Ok(())
    }
}

/// The error that broke a migration, among those of its connections: not that of one that was only
/// told to end.
pub(crate) fn culprit<T>(
    results: impl IntoIterator<Item = Result<T, PeerError>>,
) -> Result<Vec<T>, PeerError> {
    let (mut whole, mut broken) = (Vec::new(), None);
    for result in results {
        match (result, &broken) {
            (Ok(part), _) => whole.push(part),
            (Err(error), None | Some(PeerError::Cancelled)) => broken = Some(error),
            (Err(_), Some(_)) => {}
        }
    }
    broken.map_or(Ok(whole), Err)
}
