//! Migrations over a network that works, and guests that do not.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::fake::{FakeArrival, FakeGuest, FakeHost, Fault, LOW_PAGES, World, content};
use super::network::{Door, Limits, Network};
use crate::destination::{Arrived, receive};
use crate::error::{Error, Failure, one_line};
use crate::guest::Departing;
use crate::patience::{Cancel, Patience};
use crate::policy::{NoConvergence, Outcome};
use crate::progress::{Progress, Watch};
use crate::ram::PageBitmap;
use crate::record::{NoRecord, Record};
use crate::report::{Report, Status};
use crate::source::{Options, send};

pub(super) fn patience() -> Patience {
    let milliseconds = Duration::from_millis;
    Patience {
        greeting: milliseconds(2000),
        prepare: milliseconds(2000),
        silence: milliseconds(2000),
        stopped: milliseconds(5000),
        running: milliseconds(300),
        settling: milliseconds(1000),
        asking: milliseconds(200),
        answering: milliseconds(1500),
    }
}

pub(super) fn options() -> Options {
    Options { patience: patience(), ..Options::default() }
}

/// A migration that was tried.
pub(super) struct Tried {
    pub(super) world: Arc<World>,
    pub(super) guest: FakeGuest,
    pub(super) sent: Result<Report, Box<Failure>>,
    pub(super) arrived: Result<Arrived<FakeArrival>, Box<Failure>>,
    pub(super) passed: (usize, usize),
    /// How many connections the source made.
    pub(super) connections: usize,
}

impl Tried {
    pub(super) fn status(&self) -> Status {
        self.sent.as_ref().map_or_else(|failure| failure.report.status, |report| report.status)
    }

    pub(super) fn error(&self) -> String {
        self.sent.as_ref().err().map(|failure| one_line(&**failure)).unwrap_or_default()
    }

    /// Asserts that the guest runs there, whole.
    pub(super) fn assert_there(&self) {
        assert_eq!(self.world.runners(), (false, true), "{}", self.error());
        let arrived = self.arrived.as_ref().unwrap();
        assert!(content(&arrived.guest.ram) == content(&self.guest.ram), "memory differs");
        assert_eq!(arrived.guest.count, self.guest.count());
    }
}

/// Tries to move `guest` to `host`.
pub(super) fn try_moving(
    world: Arc<World>,
    guest: FakeGuest,
    host: FakeHost,
    network: (Network, Door),
    options: &Options,
) -> Tried {
    try_all(world, guest, host, network, options, [Box::new(NoRecord), Box::new(NoRecord)])
}

/// Tries to move a guest whose sides write their decisions down.
pub(super) fn try_recorded(records: [Box<dyn Record>; 2]) -> Tried {
    let world = Arc::<World>::default();
    let guest = FakeGuest::new(&world, Fault::None);
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let network = Network::new(Limits::NONE, Some(Limits::NONE));
    try_all(world, guest, host, network, &options(), records)
}

fn try_all(
    world: Arc<World>,
    mut guest: FakeGuest,
    mut host: FakeHost,
    (mut network, door): (Network, Door),
    options: &Options,
    [here, there]: [Box<dyn Record>; 2],
) -> Tried {
    let (cancel, done) = (Cancel::new(), Cancel::new());
    let patience = options.patience;
    let waits = done.clone();
    let destination = thread::Builder::new().spawn(move || {
        let progress = &mut |_: &Progress| {};
        let watch = Watch { progress, cancel: waits, record: there };
        let mut arrived = receive(&mut host, door, &patience, watch);
        arrived.iter_mut().for_each(|arrived| arrived.homecoming.back("net0"));
        arrived
    });
    let watch = Watch { progress: &mut |_| {}, cancel, record: here };
    let sent = send(&mut guest, |_| network.connect(), options, watch);
    let destination = destination.unwrap();
    // Where nothing came of it, the destination waits for another connection.
    for _ in 0..30 {
        if !destination.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
    }
    done.cancel();
    let arrived = destination.join().unwrap();
    let passed = *network.passed.lock().unwrap();
    Tried { world, guest, sent, arrived, passed, connections: network.connections }
}

fn moved(fault: Fault, options: &Options) -> Tried {
    let world = Arc::<World>::default();
    let guest = FakeGuest::new(&world, fault);
    let host = FakeHost { world: world.clone(), fault, low_pages: LOW_PAGES };
    try_moving(world, guest, host, Network::new(Limits::NONE, Some(Limits::NONE)), options)
}

#[test]
fn a_guest_arrives_with_all_it_had() {
    let tried = moved(Fault::None, &options());
    tried.assert_there();
    let report = tried.sent.as_ref().unwrap();
    assert_eq!(report.status, Status::Completed);
    assert_eq!((report.outcome, report.throttled_percent), (Some(Outcome::Converged), 0));
    assert_eq!((report.pages, report.zero_pages), (3, 9));
    assert_eq!(report.rounds, 2);
    let arrived = tried.arrived.unwrap();
    assert_eq!((arrived.report.pages, arrived.report.zero_pages), (3, 9));
    assert_eq!(arrived.report.bytes_sent, report.bytes_sent);
    arrived.answering.wait(); // the source said DONE
}

#[test]
fn checksums_go_with_memory_if_wanted() {
    let plain = moved(Fault::None, &options());
    let checked = moved(Fault::None, &Options { checked: true, ..options() });
    checked.assert_there();
    let more = checked.passed.0 - plain.passed.0;
    assert_eq!(more, 2 * 4, "two stretches of memory carry four bytes more");
}

#[test]
fn a_guest_that_writes_all_the_time_arrives_as_it_was_when_it_stopped() {
    for (pages, ledger) in [(1, false), (3, true), (300, false), (300, true)] {
        let world = Arc::<World>::default();
        let mut guest = FakeGuest::with_memory(&world, Fault::None, 700);
        if ledger {
            guest.keep_a_ledger(None);
        }
        guest.write_all_the_time(300, pages);
        while guest.count() == 41 {
            thread::sleep(Duration::from_millis(1));
        }
        let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: 700 };
        let network = Network::new(Limits::NONE, Some(Limits::NONE));
        let mut options = options();
        options.policy.downtime_limit = Duration::ZERO;
        options.bandwidth_limit = Some(20 << 20);
        let tried = try_moving(world, guest, host, network, &options);
        tried.assert_there();
        let report = tried.sent.as_ref().unwrap();
        assert!(report.rounds > 3, "{report:?}");
        assert_eq!(report.outcome, Some(Outcome::Forced));
        assert!(tried.guest.count() > 41, "the guest wrote");
    }
}

#[test]
fn a_guest_whose_log_is_cleared_as_its_pages_are_sent_arrives_with_all_it_had() {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::new(&world, Fault::None);
    guest.keep_a_ledger(None);
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let network = Network::new(Limits::NONE, Some(Limits::NONE));
    let tried = try_moving(world, guest, host, network, &options());
    tried.assert_there();
    let report = tried.sent.unwrap();
    assert_eq!((report.pages, report.zero_pages, report.rounds), (3, 9, 2), "each page once");
}

#[test]
fn a_dirty_log_that_cannot_be_cleared_leaves_the_guest_running() {
    for fails_at in [0, 1, 2] {
        let world = Arc::<World>::default();
        let mut guest = FakeGuest::new(&world, Fault::None);
        guest.write_all_the_time(0, LOW_PAGES);
        guest.keep_a_ledger(Some(fails_at));
        let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
        let network = Network::new(Limits::NONE, Some(Limits::NONE));
        let mut options = options();
        options.policy.downtime_limit = Duration::ZERO;
        let mut tried = try_moving(world, guest, host, network, &options);
        assert_eq!(tried.world.runners(), (true, false));
        let why = "cannot clear the dirty log of the ledger: unsupported";
        assert_eq!(tried.error(), why);
        let mut pages = PageBitmap::empty(&tried.guest.ram);
        tried.guest.dirty().culprit(&mut pages).unwrap();
        assert!(pages.count() <= LOW_PAGES, "the log was left clean: only new writes are in it");
    }
}

/// A guest that writes a MiB over and over, before that is sent.
fn busy_guest(world: &Arc<World>, tells: bool) -> FakeGuest {
    let mut guest = FakeGuest::with_memory(world, Fault::None, 700);
    guest.outrun(tells);
    guest
}

/// To stop for less than it takes to send that.
fn busy_options(wish: NoConvergence) -> Options {
    let mut options = options();
    options.policy.downtime_limit = Duration::from_millis(1);
    options.policy.on_no_convergence = wish;
    options.bandwidth_limit = Some(15 << 20);
    options
}

fn moved_although_busy(wish: NoConvergence, tells: bool) -> Tried {
    let world = Arc::<World>::default();
    let guest = busy_guest(&world, tells);
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: 700 };
    let network = Network::new(Limits::NONE, Some(Limits::NONE));
    let tried = try_moving(world, guest, host, network, &busy_options(wish));
    assert_eq!(tried.guest.throttled(), 0, "nobody is slow for ever");
    tried
}

#[test]
fn a_busy_guest_is_slowed_down_until_it_can_be_moved() {
    let tried = moved_although_busy(NoConvergence::Throttle, false);
    tried.assert_there();
    let report = tried.sent.unwrap();
    assert_eq!(report.outcome, Some(Outcome::Throttled), "{report:?}");
    assert!((20..=99).contains(&report.throttled_percent), "{report:?}");
    assert!(report.throttled_vcpus.is_empty(), "nobody knows who wrote");
    assert_eq!(tried.guest.bystander_throttled(), report.throttled_percent);
}

#[test]
fn only_the_vcpu_that_writes_is_slowed_down_where_it_is_known() {
    let tried = moved_although_busy(NoConvergence::Throttle, true);
    tried.assert_there();
    let report = tried.sent.unwrap();
    assert_eq!(report.outcome, Some(Outcome::Throttled), "{report:?}");
    assert_eq!(report.throttled_vcpus, [report.throttled_percent, 0]);
    assert_eq!(tried.guest.bystander_throttled(), 0);
}

#[test]
fn a_busy_guest_stays_if_so_wished() {
    let tried = moved_although_busy(NoConvergence::Fail, false);
    assert_eq!(tried.world.runners(), (true, false));
    let failure = tried.sent.as_ref().unwrap_err();
    assert!(matches!(failure.error, Error::NoConvergence { .. }), "{}", tried.error());
    assert_eq!(failure.report.outcome, Some(Outcome::GaveUp));
    assert_eq!(failure.report.status, Status::Failed);
    assert_eq!(tried.world.undone.load(Ordering::SeqCst), 0, "it never stopped");
}

#[test]
fn a_guest_that_was_slowed_down_runs_freely_after_a_failure() {
    let world = Arc::<World>::default();
    let (mut guest, options) = (busy_guest(&world, false), busy_options(NoConvergence::Throttle));
    let (mut network, door) = Network::new(Limits::NONE, Some(Limits::NONE));
    let mut host = FakeHost { world, fault: Fault::None, low_pages: 700 };
    let (cancel, done) = (Cancel::new(), Cancel::new());
    let (wish, waits) = (cancel.clone(), done.clone());
    let destination = thread::Builder::new().spawn(move || {
        let progress = &mut |_: &Progress| {};
        let watch = Watch { progress, cancel: waits, record: Box::new(NoRecord) };
        drop(receive(&mut host, door, &patience(), watch));
    });
    let mut slowest = 0;
    let progress = &mut |progress: &Progress| {
        slowest = slowest.max(progress.throttled_percent);
        if slowest > 0 {
            wish.cancel();
        }
    };
    let watch = Watch { progress, cancel, record: Box::new(NoRecord) };
    let sent = send(&mut guest, |_| network.connect(), &options, watch);
    done.cancel();
    destination.unwrap().join().unwrap();
    let failure = sent.unwrap_err();
    assert_eq!(failure.report.status, Status::Cancelled);
    assert!(slowest > 0 && failure.report.throttled_percent == slowest);
    assert_eq!(guest.throttled(), 0);
}

#[test]
fn a_dry_run_asks_and_changes_nothing() {
    let tried = moved(Fault::None, &Options { dry_run: true, ..options() });
    assert_eq!(tried.world.runners(), (true, false));
    assert_eq!(tried.status(), Status::Completed);
    assert_eq!(tried.world.undone.load(Ordering::SeqCst), 0);
    let waited_on = tried.arrived.err().unwrap();
    assert!(matches!(waited_on.error, Error::Cancelled), "it waited for another connection");
}

#[test]
fn a_guest_that_does_not_fit_is_told_why() {
    let tried = moved(Fault::Mismatch, &options());
    assert_eq!(tried.world.runners(), (true, false));
    let told = "device: wanted \"lamp\", found \"radio\"";
    assert!(tried.error().contains(told), "{}", tried.error());
    assert_eq!(tried.world.undone.load(Ordering::SeqCst), 0, "the guest never stopped");
}

#[test]
fn a_device_that_does_not_stop_leaves_the_guest_running() {
    let tried = moved(Fault::StuckDevice, &options());
    assert_eq!(tried.world.runners(), (true, false));
    assert_eq!(tried.world.undone.load(Ordering::SeqCst), 1, "the vCPU runs on, told once");
    assert_eq!(tried.error(), "cannot stop the stuck device: it does not answer");
    let there = one_line(&*tried.arrived.err().unwrap());
    assert!(there.ends_with("cannot stop the stuck device: it does not answer"), "{there}");
}

#[test]
fn what_is_written_while_the_guest_comes_to_a_stop_is_sent() {
    let tried = moved(Fault::Relay, &options());
    tried.assert_there();
    assert!(content(&tried.guest.ram).windows(7).any(|bytes| bytes == b"relayed"));
}

#[test]
fn a_device_that_writes_memory_too_late_is_caught() {
    let tried = moved(Fault::LateWriter, &options());
    assert_eq!(tried.world.runners(), (true, false));
    let error = "own writes wrote guest memory at 0x100000000 after the last of it was sent";
    assert_eq!(tried.error(), error);
}

#[test]
fn a_state_that_is_refused_leaves_the_guest_running() {
    let tried = moved(Fault::BadState, &options());
    assert_eq!(tried.world.runners(), (true, false));
    assert!(tried.error().contains("a guest can only count so far"), "{}", tried.error());
}

#[test]
fn a_guest_that_cannot_be_started_there_comes_back() {
    let tried = moved(Fault::NoStart, &options());
    assert_eq!(tried.world.runners(), (true, false));
    assert_eq!(tried.status(), Status::Failed);
    assert!(matches!(tried.sent.err().unwrap().error, Error::GivenBack));
    assert!(matches!(tried.arrived.err().unwrap().error, Error::Start(_)));
}

#[test]
fn memory_of_another_shape_is_a_mismatch() {
    let world = Arc::<World>::default();
    let guest = FakeGuest::new(&world, Fault::None);
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES + 1 };
    let network = Network::new(Limits::NONE, Some(Limits::NONE));
    let tried = try_moving(world, guest, host, network, &options());
    assert!(matches!(tried.sent.err().unwrap().error, Error::Refused(_)));
    assert_eq!(tried.world.runners(), (true, false));
}
