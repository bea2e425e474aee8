//! The straight line out.

mod custody;
mod passes;
mod sharing;

use std::io;
use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use custody::Custody;

use crate::asking::query;
use crate::compat::Offer;
use crate::error::{Error, Failure, one_line};
use crate::guest::Departing;
use crate::handover::{Giving, Token, Verdict};
use crate::patience::{Cancel, Patience, TICK};
use crate::plan::{Entered, Phase, StepFailure};
use crate::policy::{NoConvergence, Policy, Shares};
use crate::progress::{Progress, Stage, Watch};
use crate::ram::{self, PageBitmap};
use crate::report::{Report, Status, milliseconds};
use crate::state::StateWriter;
use crate::wire::{Channel, Compression, Lanes, MOST_STREAMS, Message, Stream};

/// How often a peer that has nothing to do is told that this side is alive.
const ALIVE: Duration = Duration::from_secs(1);

/// How to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Only ask whether the destination could take it.
    pub dry_run: bool,
    /// When to stop copying.
    pub policy: Policy,
    /// Bytes per second while the guest runs. The last pass takes what it gets.
    pub bandwidth_limit: Option<u64>,
    /// Over how many connections memory flows: 1 to [`MOST_STREAMS`]; anything else counts as the
    /// nearest of these.
    pub streams: u8,
    /// Send a checksum with all memory. Costs a copy and a CRC-32 of each page on both sides.
    pub checked: bool,
    /// What memory is packed with, if the destination can unpack it.
    pub compression: Compression,
    /// Pass the memory itself, over a Unix socket, instead of sending what is in it. Then there is
    /// one connection, and nothing that is about memory on the wire means anything.
    pub shared: bool,
    /// How long to wait for the destination.
    pub patience: Patience,
}

impl Default for Options {
    fn default() -> Self {
        let downtime_limit = Duration::from_millis(300);
        Self {
            dry_run: false,
            policy: Policy {
                downtime_limit,
                max_rounds: 30,
                on_no_convergence: NoConvergence::default(),
            },
            bandwidth_limit: None,
            streams: 1,
            checked: false,
            compression: Compression::None,
            shared: false,
            patience: Patience::default(),
        }
    }
}

/// Moves `guest` to the destination that `connect` connects to.
///
/// When this returns, the guest runs here or there and nowhere else; except if the error is
/// [`Error::Undecided`]: then it stands still here, and its plan can be undone by an operator who
/// knows that it does not run there. `connect` is called again if the connection breaks in the one
/// moment that matters; it bounds its own waits, and heeds who wishes to stop.
pub fn send<G: Departing, S: Stream>(
    guest: &mut G,
    connect: impl FnMut(&Cancel) -> io::Result<S>,
    options: &Options,
    mut watch: Watch<'_>,
) -> Result<Report, Box<Failure>> {
    let start = Instant::now();
    let mut report = Report::default();
    let source = Source {
        custody: Custody::of(guest),
        connect,
        lanes: Lanes::new(),
        options,
        watch: &mut watch,
        report: &mut report,
        progress: Progress::default(),
        throttled: Shares::NONE,
        start,
    };
    let outcome = source.run();
    if report.total_ms == 0 {
        report.total_ms = milliseconds(start.elapsed());
    }
    report.devices = guest.devices();
    match outcome {
        Ok(()) => {
            report.status = Status::Completed;
            Ok(report)
        }
        Err(error) => Err(Failure::of(error, report)),
    }
}

struct Source<'a, 'w, G: Departing, S, C> {
    /// Dropping it gives the guest back to its vCPUs, unless it may run elsewhere.
    custody: Custody<'a, G>,
    connect: C,
    /// The connections for memory besides the first.
    lanes: Lanes<S>,
    options: &'a Options,
    watch: &'a mut Watch<'w>,
    report: &'a mut Report,
    progress: Progress,
    /// For how much of the time vCPUs are kept from running now.
    throttled: Shares,
    start: Instant,
}

impl<G: Departing, S: Stream, C: FnMut(&Cancel) -> io::Result<S>> Source<'_, '_, G, S, C> {
    fn run(mut self) -> Result<(), Error> {
        self.prepare()?;
        let mut peer = self.greet(self.options.patience.silence)?;
        self.travel(&mut peer).map_err(|error| parting(&mut peer, error))
    }

    /// The whole migration. Whatever fails before `commit`, the guest runs on here.
    fn travel(mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        let shared = self.options.shared;
        if shared {
            self.share(peer)?;
        }
        let token = self.agree(peer)?;
        if self.options.dry_run {
            return Ok(());
        }
        self.widen(peer, token)?;
        if shared {
            self.stand_still(peer)?;
            self.state(peer)?;
        } else {
            let left = self.precopy(peer)?;
            let left = self.release(peer, left)?;
            self.quiesce(peer)?;
            self.rest_of_memory(peer, left)?;
            self.state(peer)?;
            self.nothing_wrote_since()?;
        }
        self.end(peer, token)?;
        self.commit(peer, token)
    }

    /// Before anybody is asked: can it leave at all?
    fn prepare(&mut self) -> Result<(), Error> {
        let cancel = self.watch.cancel.clone();
        let mut meanwhile =
            || if cancel.is_cancelled() { Err(Error::Cancelled.into()) } else { Ok(()) };
        let prepared = self.custody.guest().prepare(&mut meanwhile);
        prepared.map_err(
            |error| if cancel.is_cancelled() { Error::Cancelled } else { Error::Stays(error) },
        )
    }

    fn greet(&mut self, silence: Duration) -> Result<Channel<S>, Error> {
        let cancel = self.watch.cancel.clone();
        let stream = (self.connect)(&cancel).map_err(|error| {
            if cancel.is_cancelled() { cancel.error() } else { Error::Connect(error) }
        })?;
        let mut peer = Channel::new(stream, silence, cancel)?;
        peer.greet(self.options.patience.greeting)?;
        Ok(peer)
    }

    /// OFFER, answered by ACCEPTED or by everything that stands against it.
    fn agree(&mut self, peer: &mut Channel<S>) -> Result<Token, Error> {
        peer.now("before it answered the offer");
        self.show(peer, Stage::Preparing);
        let guest = self.custody.guest();
        let offer = Offer { ram: ram::layout(guest.ram()), ..guest.offer() };
        let (dry_run, streams) = (self.options.dry_run, self.streams());
        peer.send(&Message::Offer { offer, dry_run, streams })?;
        match peer.receive_message(self.options.patience.prepare)? {
            Message::Accepted(token) => Ok(token),
            Message::Mismatched(mismatches) => Err(Error::Refused(mismatches)),
            other => Err(peer.unexpected(&other).into()),
        }
    }

    /// The other connections that memory flows over.
    fn widen(&mut self, peer: &mut Channel<S>, token: Token) -> Result<(), Error> {
        let patience = self.options.patience;
        for _ in 1..self.streams() {
            let lane = self.greet(patience.silence)?;
            self.lanes.join(lane, token, patience.greeting)?;
        }
        self.lanes.bind(peer, &self.watch.cancel);
        let compression = self.options.compression;
        self.lanes.iter_mut().chain([peer]).for_each(|lane| lane.pack_with(compression));
        self.report.streams = self.streams();
        Ok(())
    }

    fn streams(&self) -> u8 {
        if self.options.shared { 1 } else { self.options.streams.clamp(1, MOST_STREAMS) }
    }

    /// The guest lets go of devices, one step after the other; runs on, and writes on.
    fn release(&mut self, peer: &mut Channel<S>, left: PageBitmap) -> Result<PageBitmap, Error> {
        peer.now("while the guest let go of devices");
        let mut pages = left;
        self.show(peer, Stage::Releasing);
        loop {
            // Who is asked for something must be able to answer.
            self.throttle(Shares::NONE);
            match self.enter_next(peer, Phase::Release)? {
                Entered::None => return Ok(pages),
                Entered::Quickly => {}
                Entered::Slowly => {
                    self.custody.guest().dirty().collect(&mut pages)?;
                    pages = self.until_little_is_left(peer, pages)?;
                    self.show(peer, Stage::Releasing);
                }
            }
        }
    }

    /// From running to perfectly still.
    fn quiesce(&mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        peer.now("while the guest was stopped");
        let deadline = Some(Instant::now() + self.options.patience.stopped);
        self.lanes.iter_mut().chain([&mut *peer]).for_each(|lane| lane.set_deadline(deadline));
        self.show(peer, Stage::Stopped);
        self.enter(peer, Phase::Quiesce)
    }

    fn enter(&mut self, peer: &mut Channel<S>, phase: Phase) -> Result<(), Error> {
        while self.enter_next(peer, phase)? != Entered::None {}
        Ok(())
    }

    /// Runs the next step of the plan, if there is one; the peer hears that this side is alive.
    fn enter_next(&mut self, peer: &mut Channel<S>, phase: Phase) -> Result<Entered, Error> {
        let cancel = self.watch.cancel.clone();
        let plan = self.custody.guest().plan();
        self.progress.step = plan.next(phase);
        (self.watch.progress)(&self.progress);
        let (mut said, mut lost) = (Instant::now(), None);
        let mut meanwhile = || -> Result<(), StepFailure> {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled.into());
            }
            if said.elapsed() >= ALIVE {
                said = Instant::now();
                peer.send(&Message::Alive).map_err(|error| {
                    lost = Some(error);
                    "nobody is there to give the guest to"
                })?;
            }
            Ok(())
        };
        let entered = self.custody.guest().plan().enter_next(phase, &mut meanwhile);
        self.progress.step = None;
        match (entered, lost) {
            (Err(_), _) if cancel.is_cancelled() => Err(Error::Cancelled),
            (Err(_), Some(lost)) => Err(lost.into()),
            (entered, _) => Ok(entered?),
        }
    }

    fn state(&mut self, peer: &mut Channel<S>) -> Result<(), Error> {
        let mut state = StateWriter::new();
        self.custody.guest().save(&mut state)?;
        self.report.state_bytes = state.bytes().len() as u64;
        tracing::debug!("saved");
        Ok(peer.send_state(state.bytes())?)
    }

    /// The destination has a copy of a guest that stood still; or it has nothing.
    fn nothing_wrote_since(&mut self) -> Result<(), Error> {
        let guest = self.custody.guest();
        let mut pages = PageBitmap::empty(guest.ram());
        match guest.dirty().culprit(&mut pages)? {
            None => Ok(()),
            Some((name, run)) => Err(Error::WroteTooLate { name, address: run.start.0 }),
        }
    }

    /// END, answered by READY once the destination has checked and loaded everything.
    fn end(&mut self, peer: &mut Channel<S>, token: Token) -> Result<(), Error> {
        peer.now("before it was ready");
        tracing::debug!("nothing wrote since");
        peer.send(&Message::End(peer.totals()))?;
        match peer.receive_message(self.options.patience.silence)? {
            Message::Ready(theirs) if theirs == token => {
                let record = self.watch.take_record();
                self.custody.ready(token, record).map_err(Error::Record)
            }
            other => Err(peer.unexpected(&other).into()),
        }
    }

    /// Gives the guest away.
    ///
    /// Until it is written down any failure resumes it here. From there on COMMIT may have left,
    /// and only the word of the destination tells who has it.
    fn commit(mut self, peer: &mut Channel<S>, token: Token) -> Result<(), Error> {
        if self.watch.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        self.custody.give().map_err(Error::Record)?;
        self.show(peer, Stage::HandingOver);
        // Too late to stop anything but the asking.
        let enough = mem::take(&mut self.watch.cancel);
        let state = match self.hand_over(peer, token) {
            Ok(verdict) => {
                let state = self.custody.heard(verdict, peer);
                self.account(peer);
                if state == Giving::Given {
                    self.settle(peer);
                }
                state
            }
            Err(error) => {
                tracing::warn!(error = one_line(&error), "COMMIT was not answered: asking");
                self.ask(token, &enough)
            }
        };
        match state {
            Giving::Given => Ok(()),
            Giving::Back => Err(Error::GivenBack),
            Giving::Asked | Giving::Mine | Giving::Awaited => Err(Error::Undecided { token }),
        }
    }

    /// COMMIT, answered by RUNNING.
    fn hand_over(&mut self, peer: &mut Channel<S>, token: Token) -> Result<Verdict, Error> {
        peer.now("before it said who has the guest");
        peer.set_cancel(Cancel::new());
        peer.set_deadline(None);
        peer.send(&Message::Commit(token))?;
        match peer.receive_message(self.options.patience.running)? {
            Message::Running(theirs) if theirs == token => {
                self.runs_there();
                tracing::debug!("it runs there");
                Ok(Verdict::Running)
            }
            Message::Answer(verdict) if verdict != Verdict::Unknown => Ok(verdict),
            other => Err(peer.unexpected(&other).into()),
        }
    }

    /// Asks on new connections who has the guest: once, and until someone knows, patience ends or
    /// someone has heard `enough`.
    fn ask(&mut self, token: Token, enough: &Cancel) -> Giving {
        let until = Instant::now() + self.options.patience.asking;
        loop {
            match self.query(token, enough) {
                Ok(Giving::Asked) => tracing::warn!("the destination knows nothing of it"),
                Ok(state) => return state,
                Err(error) => tracing::warn!(error = one_line(&error), "cannot ask"),
            }
            if Instant::now() >= until || enough.is_cancelled() {
                return Giving::Asked;
            }
            thread::sleep(4 * TICK);
        }
    }

    fn query(&mut self, token: Token, enough: &Cancel) -> Result<Giving, Error> {
        let stream = (self.connect)(enough).map_err(Error::Connect)?;
        let cancel = self.watch.cancel.clone();
        let (verdict, mut peer) = query(stream, token, &self.options.patience, cancel)?;
        if verdict == Verdict::Running {
            self.runs_there();
        }
        Ok(self.custody.heard(verdict, &mut peer))
    }

    /// Hears when its devices serve the guest again. Nothing but the report depends on it.
    fn settle(&mut self, peer: &mut Channel<S>) {
        let until = Instant::now() + self.options.patience.settling;
        while !self.custody.guest().devices().is_empty() {
            match peer.receive_message(until.saturating_duration_since(Instant::now())) {
                Ok(Message::Back(id)) => {
                    tracing::debug!(id, "back");
                    self.custody.guest().is_back(&id);
                }
                Ok(Message::Settled) => break,
                Ok(_) | Err(_) => {
                    tracing::warn!("the destination did not say whether the guest has its devices");
                    break;
                }
            }
        }
    }

    fn runs_there(&mut self) {
        self.report.total_ms = milliseconds(self.start.elapsed());
        let stopped = self.custody.guest().plan().stopped();
        self.report.downtime_ms = stopped.map_or(0, |since| milliseconds(since.elapsed()));
    }

    fn account(&mut self, peer: &Channel<S>) {
        self.report.rounds = self.progress.round;
        self.lanes.carried(peer).account(self.report);
    }

    fn show(&mut self, peer: &Channel<S>, stage: Stage) {
        self.progress.stage = stage;
        self.progress.bytes_sent = self.lanes.carried(peer).bytes;
        (self.watch.progress)(&self.progress);
    }
}

/// Tells the peer why it ends, or learns that from the peer.
fn parting<S: Stream>(peer: &mut Channel<S>, error: Error) -> Error {
    match error {
        Error::Peer(error) if error.is_end() => peer.last_words(error).into(),
        error => {
            peer.give_up(&one_line(&error));
            error
        }
    }
}
