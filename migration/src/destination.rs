//! The straight line in.

mod homecoming;
mod welcome;

use std::time::Instant;

pub use homecoming::Homecoming;
pub(crate) use welcome::prepare;
use welcome::welcome;

use crate::answering::{Answering, Seat};
use crate::error::{Error, Failure, one_line};
use crate::guest::{Arriving, Host};
use crate::handover::{Handover, Taking, TakingEvent, Token};
use crate::patience::{Cancel, Patience};
use crate::progress::Watch;
use crate::ram::receive::Passes;
use crate::report::{Report, Status, milliseconds};
use crate::state::StateReader;
use crate::wire::{Channel, Lanes, Listener, Message, PeerError, Received, Stream};

/// A guest that has arrived and runs.
#[derive(Debug)]
pub struct Arrived<G> {
    /// The guest.
    pub guest: G,
    /// What it cost, seen from here.
    pub report: Report,
    /// Answers the source if it has not heard. Finishes by itself.
    pub answering: Answering,
    /// Tells the source which devices serve the guest again.
    pub homecoming: Homecoming,
}

/// Waits at `listener` for a guest, takes it in and lets it run.
///
/// Whoever connects and brings nothing (a dry run, something that is not uvmm, a guest that does
/// not fit) is answered, and waiting goes on. From the first byte of memory on it is about one
/// guest only: if that does not make it here, this fails, and the guest is at its source.
pub fn receive<H: Host, L: Listener + 'static>(
    host: &mut H,
    listener: L,
    patience: &Patience,
    mut watch: Watch<'_>,
) -> Result<Arrived<H::Guest>, Box<Failure>>
where
    L::Stream: 'static,
{
    match welcome(host, &listener, patience, &mut watch) {
        Ok(arrival) => arrival.run(listener),
        Err(error) => Err(Failure::of(error, Report::default())),
    }
}

/// A guest on its way in.
struct Arrival<'a, 'w, S, G> {
    peer: Channel<S>,
    /// The connections for memory besides that.
    lanes: Lanes<S>,
    guest: G,
    token: Token,
    /// The first of its memory, or of its state if that is shared, until it is taken.
    first: Option<Received>,
    /// Whether its memory is that of the source, which has it until COMMIT.
    shared: bool,
    patience: &'a Patience,
    watch: &'a mut Watch<'w>,
    started: Instant,
}

/// What came of it.
#[derive(Default)]
struct Outcome {
    report: Report,
    answering: Option<Answering>,
}

impl<S: Stream + 'static, G: Arriving> Arrival<'_, '_, S, G> {
    fn run<L: Listener + 'static>(mut self, listener: L) -> Result<Arrived<G>, Box<Failure>>
    where
        L::Stream: 'static,
    {
        let mut outcome = Outcome::default();
        let arrived = self.take_in(listener, &mut outcome);
        let Outcome { mut report, answering } = outcome;
        report.total_ms = milliseconds(self.started.elapsed());
        self.lanes.carried(&self.peer).account(&mut report);
        report.state_bytes = self.peer.totals().state_bytes;
        match (arrived, answering) {
            (Ok(()), Some(answering)) => {
                report.status = Status::Completed;
                let homecoming = Homecoming::over(self.peer);
                Ok(Arrived { guest: self.guest, report, answering, homecoming })
            }
            (arrived, answering) => {
                let error = match arrived.err().unwrap_or(Error::TakenBack) {
                    error if error.is_cancelled() => self.watch.cancel.error(),
                    error => error,
                };
                self.peer.give_up(&one_line(&error));
                Err(Box::new(Failure { answering, ..*Failure::of(error, report) }))
            }
        }
    }

    /// The whole arrival. Nothing runs the guest but `run_at_commit`.
    fn take_in<L: Listener + 'static>(
        &mut self,
        listener: L,
        outcome: &mut Outcome,
    ) -> Result<(), Error>
    where
        L::Stream: 'static,
    {
        let state = self.memory(&mut outcome.report)?;
        let stopped = Instant::now();
        self.end()?;
        tracing::debug!("all is here");
        self.load(&state)?;
        tracing::debug!("loaded");
        let seat = self.be_ready(listener, &mut outcome.answering)?;
        self.run_at_commit(&seat)?;
        tracing::debug!("running");
        outcome.report.downtime_ms = milliseconds(stopped.elapsed());
        self.say_running(&seat, outcome.answering.as_ref());
        Ok(())
    }

    /// Memory, pass after pass, until the state arrives: gives that.
    fn memory(&mut self, report: &mut Report) -> Result<Vec<u8>, Error> {
        self.peer.now("while it sent memory");
        let Self { peer, lanes, guest, first, shared, patience, watch, .. } = self;
        report.streams = 1 + u8::try_from(lanes.iter_mut().len()).expect("there are few lanes");
        if *shared {
            return match first.take() {
                Some(Received::State(state)) => Ok(state),
                _ => Err(peer.garbage("memory that it shares".into()).into()),
            };
        }
        let arriving = Passes::new(guest.ram(), patience.silence, lanes.broken.clone());
        let (state, rounds) = arriving.receive(peer, lanes, first.take(), watch.progress)?;
        report.rounds = rounds;
        Ok(state)
    }

    /// END: what was counted there is what arrived here.
    fn end(&mut self) -> Result<(), Error> {
        self.peer.now("before it sent END");
        let arrived = self.peer.totals();
        match self.peer.receive_message(self.patience.silence)? {
            Message::End(totals) if totals == arrived => Ok(()),
            Message::End(_) => Err(Error::Totals),
            other => Err(self.peer.unexpected(&other).into()),
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Error> {
        let mut state = StateReader::open(state)?;
        self.guest.load(&mut state)?;
        Ok(state.finish()?)
    }

    /// READY. From here on the source may ask who has the guest, so someone answers.
    fn be_ready<L: Listener + 'static>(
        &mut self,
        listener: L,
        answering: &mut Option<Answering>,
    ) -> Result<Seat, Error>
    where
        L::Stream: 'static,
    {
        let mut handover = Handover::taking(self.token, self.watch.take_record());
        handover.advance(TakingEvent::Loaded).map_err(Error::Record)?;
        let (seat, decided) = (Seat::new(handover), Cancel::new());
        self.peer.set_cancel(self.watch.cancel.or(&decided));
        let desk = Answering::start(listener, seat.clone(), *self.patience, decided);
        *answering = Some(desk.map_err(Error::Listen)?);
        Ok(seat)
    }

    /// COMMIT, and nothing else, runs the guest; unless the source was told otherwise meanwhile.
    fn run_at_commit(&mut self, seat: &Seat) -> Result<(), Error> {
        let committed = self.await_commit();
        let mut seat = seat.lock();
        let decided = match committed {
            Ok(()) => self.start(&mut seat),
            Err(_) if seat.state() == Taking::Dead => Err(Error::TakenBack),
            Err(error) => Err(error.into()),
        };
        if decided.is_err() {
            // Nobody waits for it on paper: a process that ends does not run the guest either.
            let _unwritten = seat.advance(TakingEvent::Lost);
            self.peer.set_cancel(Cancel::new());
            let _unheard = self.peer.send(&Message::Answer(seat.asked())); // it will ask
        }
        decided
    }

    fn await_commit(&mut self) -> Result<(), PeerError> {
        self.peer.now("before it sent COMMIT");
        self.peer.send(&Message::Ready(self.token))?;
        match self.peer.receive_message(self.patience.silence)? {
            Message::Commit(token) if token == self.token => Ok(()),
            other => Err(self.peer.unexpected(&other)),
        }
    }

    /// Written down first, and decided while nobody else can.
    fn start(&mut self, seat: &mut Handover<Taking>) -> Result<(), Error> {
        if !seat.advance(TakingEvent::Commit).map_err(Error::Record)?.may_run() {
            return Err(Error::TakenBack);
        }
        self.guest.run().map_err(|error| {
            let _unwritten = seat.advance(TakingEvent::CouldNotStart);
            Error::Start(error)
        })
    }

    /// RUNNING, answered by DONE. If the source does not hear, it asks, and is answered.
    fn say_running(&mut self, seat: &Seat, answering: Option<&Answering>) {
        self.peer.set_cancel(Cancel::new());
        self.peer.set_deadline(Some(Instant::now() + self.patience.running));
        let said = self.peer.send(&Message::Running(self.token));
        let heard = said.and_then(|()| self.peer.receive_message(self.patience.running));
        self.peer.set_deadline(None);
        match heard {
            Ok(Message::Done(token)) if token == self.token => {
                seat.lock().done();
                answering.iter().for_each(|answering| answering.stop());
            }
            Ok(_) => tracing::warn!("the source did not say that it knows"),
            Err(error) => tracing::warn!(%error, "the source may not know that the guest runs"),
        }
    }
}
