//! A network that breaks after any byte: the guest runs at exactly one place, whole.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::fake::{FakeGuest, FakeHost, Fault, LOW_PAGES, World, content};
use super::journeys::{Tried, options, try_moving};
use super::network::{Break, Limits, Network};
use crate::error::Error;
use crate::guest::Departing;
use crate::handover::{Giving, Taking, Token};
use crate::record::{Record, Role};
use crate::report::Status;
use crate::source::Options;

/// A message with a token: header, which message, token, checksum.
pub(super) const MESSAGE: usize = 16 + 1 + 16 + 4;

pub(super) fn moved(first: Limits, later: Option<Limits>, options: &Options) -> Tried {
    moved_to(Fault::None, first, later, options)
}

/// Tries to move a guest to a host at which `fault` happens.
fn moved_to(fault: Fault, first: Limits, later: Option<Limits>, options: &Options) -> Tried {
    let world = Arc::<World>::default();
    let guest = FakeGuest::new(&world, Fault::None);
    let host = FakeHost { world: world.clone(), fault, low_pages: LOW_PAGES };
    try_moving(world, guest, host, Network::new(first, later), options)
}

/// Asserts that the guest is at one place, whole, and that the source knows where.
pub(super) fn assert_decided(tried: &Tried, case: &str) {
    match tried.world.runners() {
        (true, false) => {
            assert_eq!(tried.status(), Status::Failed, "{case}: {}", tried.error());
            assert!(tried.arrived.is_err(), "{case}");
            assert!(content(&tried.guest.ram).windows(5).any(|bytes| bytes == b"first"), "{case}");
        }
        (false, true) => {
            assert_eq!(tried.status(), Status::Completed, "{case}: {}", tried.error());
            tried.assert_there();
        }
        runners => panic!("{case}: runs at {runners:?}: {}", tried.error()),
    }
}

/// Every byte near both ends, where the messages are, and some within memory.
pub(super) fn places(total: usize) -> impl Iterator<Item = usize> {
    (0..total).filter(move |&at| at < 420 || at + 420 > total || at % 509 == 0)
}

#[test]
fn a_connection_cut_after_any_byte_leaves_one_runner() {
    let whole = moved(Limits::NONE, None, &options());
    let (out, back) = whole.passed;
    let cut_out = places(out).map(|out| Limits { out, ..Limits::NONE });
    let cut_back = places(back).map(|back| Limits { back, ..Limits::NONE });
    let (mut here, mut there) = (0, 0);
    for limits in cut_out.chain(cut_back) {
        let tried = moved(limits, Some(Limits::NONE), &options());
        assert_decided(&tried, &format!("{limits:?}"));
        if tried.arrived.is_ok() { there += 1 } else { here += 1 }
    }
    assert!(here > 300 && there > 20, "{here} stayed, {there} arrived");
}

#[test]
fn a_destination_that_cannot_be_asked_leaves_the_guest_undecided() {
    let (out, back) = moved(Limits::NONE, None, &options()).passed;
    let mut undecided = 0;
    let cut_out = (out - 60..out).map(|out| Limits { out, ..Limits::NONE });
    let cut_back = (back - 60..back).map(|back| Limits { back, ..Limits::NONE });
    let mut options = options();
    options.patience.asking = Duration::from_millis(1);
    for limits in cut_out.chain(cut_back).step_by(3) {
        let mut tried = moved(limits, None, &options);
        let (here, there) = tried.world.runners();
        match tried.status() {
            Status::Completed => assert_eq!((here, there), (false, true), "{limits:?}"),
            Status::Failed => assert_eq!((here, there), (true, false), "{limits:?}"),
            Status::Undecided => {
                undecided += 1;
                assert!(!here, "{limits:?}: nobody here may resume it unasked");
                assert!(tried.error().contains("resume here only if"), "{}", tried.error());
                assert!(tried.guest.plan().stopped().is_some());
                if !there {
                    tried.guest.plan().undo(); // an operator who looked there
                    assert_eq!(tried.world.runners(), (true, false));
                }
            }
            Status::Cancelled => panic!("nobody cancelled"),
        }
    }
    assert!(undecided > 10, "{undecided}");
}

#[test]
fn messages_that_vanish_are_asked_for() {
    let (out, back) = moved(Limits::NONE, None, &options()).passed;
    let hole = |out, back| Limits { out, back, how: Break::Hole };
    let cases = [
        ("COMMIT", hole(out - 2 * MESSAGE, usize::MAX), (true, false)),
        ("RUNNING", hole(usize::MAX, back - MESSAGE), (false, true)),
        ("DONE", hole(out - MESSAGE, usize::MAX), (false, true)),
    ];
    for (lost, limits, runners) in cases {
        let tried = moved(limits, Some(Limits::NONE), &options());
        assert_eq!(tried.world.runners(), runners, "{lost}: {}", tried.error());
        assert_decided(&tried, lost);
    }
}

#[test]
fn a_ready_destination_that_was_asked_never_runs() {
    let (out, _) = moved(Limits::NONE, None, &options()).passed;
    let commit_lost = Limits { out: out - 2 * MESSAGE, back: usize::MAX, how: Break::Hole };
    let tried = moved(commit_lost, Some(Limits::NONE), &options());
    assert!(matches!(tried.sent.err().unwrap().error, Error::GivenBack));
    assert!(matches!(tried.arrived.err().unwrap().error, Error::TakenBack));
}

#[test]
fn a_guest_that_could_not_start_comes_back_to_whoever_asks() {
    let (_, back) = moved(Limits::NONE, None, &options()).passed;
    let answer_lost = Limits { back: back - MESSAGE, ..Limits::NONE };
    let tried = moved_to(Fault::NoStart, answer_lost, Some(Limits::NONE), &options());
    assert_eq!(tried.world.runners(), (true, false), "{}", tried.error());
    assert!(matches!(tried.sent.err().unwrap().error, Error::GivenBack));
}

#[test]
fn a_peer_that_falls_silent_is_given_up_in_time() {
    let (out, back) = moved(Limits::NONE, None, &options()).passed;
    let mut options = options();
    options.patience.silence = Duration::from_millis(200);
    options.patience.prepare = Duration::from_millis(200);
    options.patience.greeting = Duration::from_millis(200);
    let holes =
        (0..6).map(|part| Limits { out: out / 6 * part, back: usize::MAX, how: Break::Hole });
    let silent =
        (0..3).map(|part| Limits { out: usize::MAX, back: back / 4 * part, how: Break::Hole });
    for limits in holes.chain(silent) {
        let start = Instant::now();
        let tried = moved(limits, Some(Limits::NONE), &options);
        assert_decided(&tried, &format!("{limits:?}"));
        assert!(start.elapsed() < Duration::from_secs(3), "{limits:?}");
        if tried.arrived.is_err() {
            assert!(tried.error().contains("did not move for 0.2"), "{}", tried.error());
        }
    }
}

/// Everything that was written down; fails from a given record on.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<Vec<Role>>>, usize);

impl Record for Ledger {
    fn write(&mut self, _: Token, role: Role) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        if written.len() >= self.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        written.push(role);
        Ok(())
    }
    fn forget(&mut self, _: Token) -> io::Result<()> {
        Ok(())
    }
    fn earlier(&self, _: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
        Ok(None)
    }
}

#[test]
fn every_decision_is_written_down_before_it_is_taken() {
    use super::journeys::try_recorded;
    let both = [Ledger(Arc::default(), 9), Ledger(Arc::default(), 9)];
    let tried = try_recorded(both.clone().map(|ledger| Box::new(ledger) as _));
    tried.assert_there();
    let written = |side: usize| both[side].0.lock().unwrap().clone();
    assert_eq!(written(0), [Role::Source(Giving::Asked), Role::Source(Giving::Given)]);
    let there = [Role::Destination(Taking::Ready), Role::Destination(Taking::Running)];
    assert_eq!(written(1), there);
}

#[test]
fn a_full_disk_at_either_side_leaves_the_guest_here() {
    use super::journeys::try_recorded;
    for (source, destination) in [(0, 9), (9, 0)] {
        let sides = [source, destination];
        let tried = try_recorded(sides.map(|room| Box::new(Ledger(Arc::default(), room)) as _));
        assert_decided(&tried, &format!("{sides:?}"));
        assert_eq!(tried.world.runners(), (true, false), "{sides:?}");
    }
}

#[test]
fn a_disk_that_fails_when_the_guest_is_to_run_there_leaves_it_undecided() {
    use super::journeys::try_recorded;
    // After READY nothing can be written: neither that it runs nor, surely, that it never does.
    let tried = try_recorded([9, 1].map(|room| Box::new(Ledger(Arc::default(), room)) as _));
    assert_eq!(tried.status(), Status::Undecided, "{}", tried.error());
    assert_eq!(tried.world.runners(), (false, false));
}
