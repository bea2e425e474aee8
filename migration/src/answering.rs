//! Being asked who has the guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::handover::{Handover, Taking, Token, Verdict};
use crate::patience::{Cancel, Patience, TICK};
use crate::wire::{Channel, Listener, Lobby, Message, PeerError, Stream};

/// Answers a source that lost its connection and asks who has the guest.
///
/// Runs on a thread of its own from before READY until the source has said DONE, or until
/// [`Patience::answering`] after the decision. A destination lets it finish before it exits: a
/// source that nobody answers does not know whether it may resume the guest.
#[derive(Debug)]
pub struct Answering {
    stop: Cancel,
    thread: Option<JoinHandle<()>>,
}

/// The destination's half of the decision, shared by those who can change it.
#[derive(Clone)]
pub(crate) struct Seat(Arc<Mutex<Handover<Taking>>>);

impl Seat {
    pub(crate) fn new(handover: Handover<Taking>) -> Self {
        Self(Arc::new(Mutex::new(handover)))
    }

    /// While this is held nobody else decides, and nobody is answered.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Handover<Taking>> {
        // Whoever panicked had decided already, or not yet: the state is whole either way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answering {
    /// Answers on `listener`. Sets `decided` as soon as an answer decides against this side.
    pub(crate) fn start<L: Listener + 'static>(
        listener: L,
        seat: Seat,
        patience: Patience,
        decided: Cancel,
    ) -> std::io::Result<Self>
    where
        L::Stream: 'static,
    {
        let stop = Cancel::new();
        let desk = Desk { listener, seat, patience, decided, stop: stop.clone() };
        let thread = Builder::new().name("answering".into()).spawn(move || desk.serve())?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Whether nobody will be answered any more.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it is finished.
    pub fn wait(mut self) {
        self.join();
    }

    /// Lets it finish soon: the source knows.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that answers the source panicked");
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.cancel();
        self.join();
    }
}

struct Desk<L> {
    listener: L,
    seat: Seat,
    patience: Patience,
    decided: Cancel,
    stop: Cancel,
}

impl<L: Listener> Desk<L>
where
    L::Stream: 'static,
{
    fn serve(&self) {
        let limit = self.patience.running;
        let mut lobby = Lobby::new(&self.listener, limit, limit, self.stop.clone());
        let mut until = None;
        while !self.stop.is_cancelled() && until.is_none_or(|until| Instant::now() < until) {
            if until.is_none() && matches!(self.seat.lock().state(), Taking::Running | Taking::Dead)
            {
                until = Some(Instant::now() + self.patience.answering);
            }
            match lobby.next(TICK) {
                Ok(Some((peer, message))) => match self.answer(peer, &message) {
                    Ok(()) => {}
                    Err(error) => tracing::warn!(%error, "someone who asked was not answered"),
                },
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot be asked any more");
                    return;
                }
            }
        }
    }

    /// Waits for nobody who does not know the name of a migration.
    fn answer(&self, mut peer: Channel<L::Stream>, message: &Message) -> Result<(), PeerError> {
        let limit = self.patience.running;
        let own = self.seat.lock().token();
        match *message {
            Message::Query(token) if token == own => {
                let verdict = self.decide(&mut self.seat.lock());
                if say(&mut peer, verdict, token, limit)? {
                    self.seat.lock().done();
                    self.stop.cancel();
                }
                Ok(())
            }
            Message::Query(token) => {
                let earlier = self.seat.lock().earlier(token);
                answer_for(earlier, token, &mut peer, limit)
            }
            Message::Offer { .. } => {
                peer.give_up("a guest has arrived here already: choose another destination");
                Ok(())
            }
            _ => Err(peer.unexpected(message)),
        }
    }

    /// Says RUNNING, or binds this side never to run: in one step, as the seat is locked.
    fn decide(&self, seat: &mut Handover<Taking>) -> Verdict {
        let verdict = seat.asked();
        if seat.state() == Taking::Dead {
            self.decided.cancel();
        }
        verdict
    }
}

/// Answers for an `earlier` process of this destination, if there was one that knew of `token`.
pub(crate) fn answer_for<S: Stream>(
    earlier: Option<Handover<Taking>>,
    token: Token,
    peer: &mut Channel<S>,
    limit: Duration,
) -> Result<(), PeerError> {
    let Some(mut earlier) = earlier else {
        return peer.send(&Message::Answer(Verdict::Unknown));
    };
    let verdict = earlier.asked();
    if say(peer, verdict, token, limit)? {
        earlier.done();
    }
    Ok(())
}

/// Says `verdict`; gives whether the source took note of it.
fn say<S: Stream>(
    peer: &mut Channel<S>,
    verdict: Verdict,
    token: Token,
    limit: Duration,
) -> Result<bool, PeerError> {
    peer.send(&Message::Answer(verdict))?;
    match peer.receive_message(limit)? {
        Message::Done(theirs) if theirs == token => Ok(true),
        other => Err(peer.unexpected(&other)),
    }
}
