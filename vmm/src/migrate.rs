//! Migrations as threads beside the main loop: it gives a machine away and gets it, or one, back.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::num::NonZero;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Builder as Thread};
use std::time::{Duration, Instant};

use migration::guest::Departing;
use migration::handover::{Giving, Handover};
use migration::patience::{Cancel, Patience};
use migration::plan::{Phase, Plan};
use migration::progress::{Stage, Watch};
use migration::record::FileRecord;
use migration::report::{Report, Status};
use migration::wire::{Listener, MOST_STREAMS, connect_tcp, connect_unix, listen_tcp};
use migration::{Arrived, Error, Failure, Options, ask, receive, send};

use crate::cause;
use crate::config::Address;
use crate::control::{
    DeviceReport, DryRun, MigrateRequest, MigrationReport, MigrationStatus, PlannedStep, Progress,
    Replier, Undecided,
};
use crate::event::{Event, Events};
use crate::guest::{Awaiting, Builder, Leaving, Runs};

/// How often whoever asked for a migration is told how far it is.
const PROGRESS: Duration = Duration::from_millis(100);

/// A migration under way, as the main loop holds it.
#[derive(Clone, Debug)]
pub(crate) struct Underway {
    pub(crate) cancel: Cancel,
    progress: Arc<Mutex<Progress>>,
    /// Whether a guest on its way in was let run.
    pub(crate) runs: Runs,
}

impl Underway {
    pub(crate) fn new() -> Self {
        Self { cancel: Cancel::new(), progress: Arc::default(), runs: Runs::default() }
    }

    /// How far it is.
    pub(crate) fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What came of a guest that was to leave.
#[derive(Debug)]
pub(crate) struct Departure {
    pub(crate) guest: Leaving,
    pub(crate) request: MigrateRequest,
    pub(crate) reply: Replier,
    pub(crate) result: Result<Report, Box<Failure>>,
    /// Where its decisions are written.
    pub(crate) record: FileRecord,
}

/// Where the guest is after a departure.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Elsewhere.
    Gone,
    /// Here, as it was.
    Stayed,
    /// Nobody knows.
    Undecided(Undecided, Box<Handover<Giving>>),
}

impl Departure {
    /// Tells whoever asked for it, and gives the guest back with where it is.
    pub(crate) fn conclude(self) -> (Outcome, Leaving) {
        let Self { mut guest, request, reply, result, record } = self;
        let outcome = match result {
            Ok(_) if request.dry_run => {
                let plan = planned_steps(guest.plan());
                let devices = guest.planned_devices();
                reply.finish(Ok(DryRun { to: request.to, devices, plan }));
                return (Outcome::Stayed, guest);
            }
            Ok(report) => {
                reply.finish(Ok(tell(&report)));
                Outcome::Gone
            }
            Err(failure) if request.dry_run => {
                reply.finish::<DryRun>(Err(cause::chain(&*failure)));
                Outcome::Stayed
            }
            Err(failure) => {
                reply.finish(Ok(tell(&failure.report)));
                match failure.error {
                    Error::Undecided { token } => {
                        let (to, name) = (request.to, token.to_string());
                        let half = Handover::gave(token, Giving::Asked, Box::new(record));
                        let what = Undecided { token: name, to, stopped_s: 0 };
                        Outcome::Undecided(what, Box::new(half))
                    }
                    _ => Outcome::Stayed,
                }
            }
        };
        (outcome, guest)
    }
}

fn planned_steps(plan: &Plan) -> Vec<PlannedStep> {
    let phases =
        [(Phase::Precopy, "precopy"), (Phase::Release, "release"), (Phase::Quiesce, "quiesce")];
    let steps = phases.into_iter().flat_map(|(phase, name)| {
        plan.names(phase).map(|step| PlannedStep { phase: name.to_owned(), step })
    });
    steps.collect()
}

/// What came of waiting for a guest.
pub(crate) type Arrival = Result<Arrived<Awaiting>, Box<Failure>>;

/// A migration or snapshot that could not begin: there was no thread for it, or no file.
pub(crate) struct NotBegun {
    pub(crate) guest: Leaving,
    pub(crate) reply: Replier,
    pub(crate) error: io::Error,
}

/// Moves `guest` on a thread of its own; [`Event::Departed`] brings it back.
pub(crate) fn depart(
    guest: Leaving,
    request: MigrateRequest,
    reply: Replier,
    record: FileRecord,
    events: Events,
) -> Result<Underway, Box<NotBegun>> {
    let underway = Underway::new();
    let mut meter = Meter::new(&underway);
    let cancel = underway.cancel.clone();
    // By a channel, so that the guest is not lost where no thread can be had.
    let (hand, take) = channel::<(Leaving, MigrateRequest, Replier)>();
    let thread = Thread::new().name("migration".into()).spawn(move || {
        let Ok((mut guest, request, mut reply)) = take.recv() else { return };
        let mut progress = |now: &migration::progress::Progress| {
            if let Some(progress) = meter.measure(now) {
                reply.progress(&progress);
            }
        };
        let watch = Watch { progress: &mut progress, cancel, record: Box::new(record.clone()) };
        let options = options(&request);
        let limit = options.patience.greeting;
        let result = match request.to.clone() {
            Address::Tcp { host, port } => {
                let to = |cancel: &Cancel| connect_tcp((host.clone(), port), limit, cancel);
                send(&mut guest, to, &options, watch)
            }
            Address::Unix(path) => {
                let to = |cancel: &Cancel| connect_unix(&path, limit, cancel);
                send(&mut guest, to, &options, watch)
            }
        };
        events.send(Event::Departed(Box::new(Departure { guest, request, reply, result, record })));
    });
    match thread {
        Ok(_) => {
            hand.send((guest, request, reply)).expect("the thread waits for it");
            Ok(underway)
        }
        Err(error) => Err(Box::new(NotBegun { guest, reply, error })),
    }
}

/// Has a guest that stood still go on here, on a thread of its own; [`Event::TakenBack`] brings it.
pub(crate) fn take_back(guest: Box<Leaving>, events: Events) -> Underway {
    let (hand, take) = channel::<(Box<Leaving>, Events)>();
    let take_back = |mut guest: Box<Leaving>, events: Events| {
        guest.dirty().stop();
        guest.plan().undo();
        events.send(Event::TakenBack(guest));
    };
    let thread = Thread::new().name("migration".into()).spawn(move || {
        if let Ok((guest, events)) = take.recv() {
            take_back(guest, events);
        }
    });
    match thread {
        Ok(_) => hand.send((guest, events)).expect("the thread waits for it"),
        Err(_) => take_back(guest, events), // better slowly than not at all
    }
    Underway::new()
}

/// Asks at `to`, where a guest was given away, whether it runs there.
pub(crate) fn ask_at(
    to: &Address,
    handover: &mut Handover<Giving>,
    patience: &Patience,
) -> Result<Giving, Error> {
    let (limit, nobody) = (patience.greeting, &Cancel::new());
    match to {
        Address::Tcp { host, port } => {
            ask(handover, || connect_tcp((host.clone(), *port), limit, nobody), patience)
        }
        Address::Unix(path) => ask(handover, || connect_unix(path, limit, nobody), patience),
    }
}

fn options(request: &MigrateRequest) -> Options {
    let mut options = Options {
        dry_run: request.dry_run,
        bandwidth_limit: request.bandwidth_limit,
        streams: request.streams.unwrap_or_else(usual_streams),
        shared: request.shared_memory,
        checked: request.checksums,
        compression: request.compress,
        ..Options::default()
    };
    if let Some(limit) = request.undecided_after_ms {
        options.patience.asking = Duration::from_millis(limit).min(options.patience.answering);
    }
    options.policy.downtime_limit = Duration::from_millis(request.downtime_limit_ms);
    options.policy.on_no_convergence = request.on_no_convergence;
    options
}

/// A connection for each processor: sending keeps one busy.
fn usual_streams() -> u8 {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    u8::try_from(processors).map_or(MOST_STREAMS, |processors| processors.min(MOST_STREAMS))
}

/// Waits for a guest at `at` on a thread of its own; [`Event::Arrived`] brings it.
///
/// Returns the address with the port that was really taken.
pub(crate) fn await_arrival(
    at: &Address,
    builder: Builder,
    record: FileRecord,
    events: Events,
) -> io::Result<(Underway, Address)> {
    match at {
        Address::Tcp { host, port } => {
            let listener: TcpListener = listen_tcp((host.as_str(), *port))?;
            let port = listener.local_addr()?.port();
            let address = Address::Tcp { host: host.clone(), port };
            Ok((arrive(listener, builder, record, events)?, address))
        }
        Address::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok((arrive(listener, builder, record, events)?, at.clone()))
        }
    }
}

fn arrive<L: Listener + 'static>(
    listener: L,
    mut builder: Builder,
    record: FileRecord,
    events: Events,
) -> io::Result<Underway> {
    let underway = Underway { runs: builder.runs(), ..Underway::new() };
    let mut meter = Meter::new(&underway);
    let cancel = underway.cancel.clone();
    Thread::new().name("migration".into()).spawn(move || {
        let mut progress = |now: &migration::progress::Progress| {
            meter.measure(now);
        };
        let watch = Watch { progress: &mut progress, cancel, record: Box::new(record) };
        let arrival = receive(&mut builder, listener, &Patience::default(), watch);
        events.send(Event::Arrived(Box::new(arrival)));
    })?;
    Ok(underway)
}

/// Turns what the engine tells at every frame into what people want to see now and then.
pub(crate) struct Meter {
    shared: Arc<Mutex<Progress>>,
    start: Instant,
    last: Option<Last>,
}

/// What was told last.
struct Last {
    at: Instant,
    bytes_sent: u64,
    stage: Stage,
    step: Option<String>,
}

impl Meter {
    pub(crate) fn new(underway: &Underway) -> Self {
        Self { shared: underway.progress.clone(), start: Instant::now(), last: None }
    }

    /// The progress, if it is time to tell it again.
    pub(crate) fn measure(&mut self, now: &migration::progress::Progress) -> Option<Progress> {
        let at = Instant::now();
        let last = self.last.as_ref();
        let (since, before) = last.map_or((self.start, 0), |last| (last.at, last.bytes_sent));
        let elapsed = at - since;
        let is_new = last.is_none_or(|last| (last.stage, &last.step) != (now.stage, &now.step));
        if !is_new && elapsed < PROGRESS {
            return None;
        }
        let (stage, step) = (now.stage, now.step.clone());
        self.last = Some(Last { at, bytes_sent: now.bytes_sent, stage, step });
        let sent = now.bytes_sent.saturating_sub(before);
        let progress = Progress {
            phase: phase(now.stage).to_owned(),
            step: now.step.clone(),
            round: now.round,
            round_bytes: now.round_done,
            round_total: now.round_bytes,
            bytes_sent: now.bytes_sent,
            throughput_mib_s: mib(sent) / elapsed.as_secs_f64().max(1e-3),
            elapsed_ms: u64::try_from((at - self.start).as_millis()).unwrap_or(u64::MAX),
        };
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = progress.clone();
        Some(progress)
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn phase(stage: Stage) -> &'static str {
    match stage {
        Stage::Preparing => "agreeing",
        Stage::Copying => "copying",
        Stage::Releasing => "releasing devices",
        Stage::Stopped => "switching over",
        Stage::HandingOver => "handing over",
    }
}

/// The engine's report as it goes over the control socket.
pub(crate) fn tell(report: &Report) -> MigrationReport {
    let Report {
        status,
        error,
        total_ms,
        downtime_ms,
        streams,
        rounds,
        outcome,
        throttled_percent,
        throttled_vcpus,
        bytes_sent,
        throughput_mib_s,
        pages,
        zero_pages,
        state_bytes,
        devices,
    } = report;
    MigrationReport {
        status: match status {
            Status::Completed => MigrationStatus::Completed,
            Status::Failed => MigrationStatus::Failed,
            Status::Cancelled => MigrationStatus::Cancelled,
            Status::Undecided => MigrationStatus::Undecided,
        },
        error: error.clone(),
        total_ms: *total_ms as f64,
        downtime_ms: *downtime_ms as f64,
        rounds: *rounds,
        bytes_sent: *bytes_sent,
        throughput_mib_s: *throughput_mib_s,
        devices: devices
            .iter()
            .map(|device| DeviceReport {
                id: device.id.clone(),
                strategy: device.strategy.clone(),
                paused_ms: device.paused_ms as f64,
            })
            .collect(),
        more: BTreeMap::from([
            ("outcome".to_owned(), serde_json::json!(outcome)),
            ("throttled_percent".to_owned(), (*throttled_percent).into()),
            ("throttled_vcpus".to_owned(), throttled_vcpus.as_slice().into()),
            ("streams".to_owned(), (*streams).into()),
            ("pages".to_owned(), (*pages).into()),
            ("zero_pages".to_owned(), (*zero_pages).into()),
            ("state_bytes".to_owned(), (*state_bytes).into()),
        ]),
    }
}

#[cfg(test)]
mod tests {
    use migration::handover::Token;
    use migration::record::NoRecord;

    use super::*;

    #[test]
    fn a_destination_that_takes_no_connection_is_not_asked_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _queued = connect_unix(&path, Duration::from_secs(30), &Cancel::new()).unwrap();
        let record = Box::new(NoRecord);
        let mut handover = Handover::gave(Token::random().unwrap(), Giving::Asked, record);
        let patience = Patience { greeting: Duration::from_millis(100), ..Patience::default() };
        let asked = ask_at(&Address::Unix(path), &mut handover, &patience);
        assert!(matches!(asked, Err(Error::Connect(_))), "{asked:?}");
    }

    #[test]
    fn every_step_is_told_and_all_else_now_and_then() {
        let mut meter = Meter::new(&Underway::new());
        let mut now = migration::progress::Progress::default();
        assert!(meter.measure(&now).is_some());
        assert!(meter.measure(&now).is_none());
        now.step = Some("unplug net0".into());
        let told = meter.measure(&now).and_then(|progress| progress.step);
        assert_eq!(told.as_deref(), Some("unplug net0"));
        now.stage = Stage::Stopped;
        assert!(meter.measure(&now).is_some());
        assert!(meter.measure(&now).is_none());
    }
}
