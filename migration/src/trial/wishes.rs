//! Those who wish to stop a migration, on either side.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::fake::{FakeGuest, FakeHost, Fault, LOW_PAGES, World};
use super::faults::moved;
use super::journeys::{options, patience};
use super::network::{Limits, Network};
use crate::destination::receive;
use crate::error::{Failure, one_line};
use crate::guest::Departing;
use crate::patience::{Cancel, TICK};
use crate::progress::{Progress, Stage, Watch};
use crate::record::NoRecord;
use crate::report::Status;
use crate::source::{Options, send};

/// A migration that came to nothing, as both sides tell it.
struct Stopped {
    world: Arc<World>,
    guest: FakeGuest,
    here: Box<Failure>,
    there: Box<Failure>,
}

/// Moves a guest over connections with these limits; when it is at `stage`, `wish` is told with
/// how the source and the destination can be stopped.
fn stopped(
    limits: (Limits, Option<Limits>),
    options: &Options,
    stage: Stage,
    wish: impl Fn(&Cancel, &Cancel),
) -> Stopped {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::new(&world, Fault::None);
    let (mut network, door) = Network::new(limits.0, limits.1);
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (here, there) = (Cancel::new(), Cancel::new());
    let waits = there.clone();
    let destination = thread::Builder::new().spawn(move || {
        let progress = &mut |_: &Progress| {};
        let watch = Watch { progress, cancel: waits, record: Box::new(NoRecord) };
        receive(&mut host, door, &patience(), watch).err().unwrap()
    });
    let cancel = here.clone();
    let progress = &mut |progress: &Progress| {
        if progress.stage == stage {
            wish(&here, &there);
        }
    };
    let watch = Watch { progress, cancel, record: Box::new(NoRecord) };
    let here = send(&mut guest, |_| network.connect(), options, watch).err().unwrap();
    there.cancel(); // it may wait for another guest
    let there = destination.unwrap().join().unwrap();
    Stopped { world, guest, here, there }
}

const WORKS: (Limits, Option<Limits>) = (Limits::NONE, Some(Limits::NONE));

#[test]
fn a_migration_can_be_cancelled_at_every_stage() {
    for stage in [Stage::Preparing, Stage::Copying, Stage::Stopped] {
        let mut stopped = stopped(WORKS, &options(), stage, |here, _| here.cancel());
        assert_eq!(stopped.here.report.status, Status::Cancelled, "{stage:?}");
        assert_eq!(stopped.world.runners(), (true, false));
        assert!(stopped.guest.plan().stopped().is_none());
        let told = one_line(&*stopped.there);
        assert!(told.ends_with("cancelled"), "{stage:?}: {told}");
    }
}

#[test]
fn a_migration_can_be_cancelled_while_nobody_answers() {
    let world = Arc::<World>::default();
    let (mut guest, cancel) = (FakeGuest::new(&world, Fault::None), Cancel::new());
    let connect = |heeded: &Cancel| {
        cancel.cancel();
        assert!(heeded.is_cancelled());
        Err::<UnixStream, _>(ErrorKind::Other.into())
    };
    let progress = &mut |_: &Progress| {};
    let watch = Watch { progress, cancel: cancel.clone(), record: Box::new(NoRecord) };
    let here = send(&mut guest, connect, &options(), watch).err().unwrap();
    assert_eq!(here.report.status, Status::Cancelled);
    assert_eq!(world.runners(), (true, false));
}

#[test]
fn a_destination_that_can_no_longer_take_the_guest_says_why() {
    for stage in [Stage::Copying, Stage::Stopped, Stage::HandingOver] {
        let stopped = stopped(WORKS, &options(), stage, |_, there| {
            there.withdraw("the lamp is gone".into());
            thread::sleep(4 * TICK); // so that it is heeded now
        });
        assert_eq!(stopped.here.report.status, Status::Failed, "{stage:?}");
        assert_eq!(stopped.world.runners(), (true, false), "{stage:?}");
        assert_eq!(one_line(&*stopped.there), "the lamp is gone", "{stage:?}");
        let told = one_line(&*stopped.here);
        let reason =
            if stage == Stage::HandingOver { "gave the guest back" } else { "lamp is gone" };
        assert!(told.contains(reason), "{stage:?}: {told}");
    }
}

#[test]
fn nobody_has_to_wait_until_a_destination_that_is_gone_was_asked_long_enough() {
    let (out, _) = moved(Limits::NONE, None, &options()).passed;
    // It is cut within COMMIT, and there is no other connection.
    let cut = Limits { out: out - 50, ..Limits::NONE };
    let mut options = options();
    options.patience.asking = Duration::from_secs(60);
    let start = Instant::now();
    let stopped = stopped((cut, None), &options, Stage::HandingOver, |here, _| here.cancel());
    assert_eq!(stopped.here.report.status, Status::Undecided, "{}", one_line(&*stopped.here));
    assert!(start.elapsed() < options.patience.asking / 2);
    assert_eq!(stopped.world.runners(), (false, false), "nobody runs it unasked");
}
