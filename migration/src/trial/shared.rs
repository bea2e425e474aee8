//! Guests whose memory stays where it is, between processes of one host.

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::disguise::Disguised;
use super::fake::{FakeArrival, FakeGuest, FakeHost, Fault, HIGH_PAGES, LOW_PAGES, World};
use super::fake::{content, mapped};
use super::faults::assert_decided;
use super::journeys::{Tried, options, patience, try_moving};
use super::matrix::{hasty, try_each};
use super::network::{Break, Limits, Network};
use crate::destination::{Arrived, receive};
use crate::error::{Failure, one_line};
use crate::guest::Departing;
use crate::patience::Cancel;
use crate::progress::Watch;
use crate::ram::PAGE;
use crate::record::NoRecord;
use crate::report::Report;
use crate::source::{Options, send};
use crate::state::StateWriter;
use crate::wire::{Channel, Message, VERSIONS};

const SEALED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

fn shared() -> Options {
    Options { shared: true, streams: 4, ..options() }
}

fn memory(seals: SealFlags) -> [File; 2] {
    [LOW_PAGES, HIGH_PAGES].map(|pages| {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("guest", flags).unwrap());
        file.set_len(pages * PAGE).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    })
}

fn guest(world: &Arc<World>, fault: Fault, seals: SealFlags) -> FakeGuest {
    FakeGuest::in_memory(world, fault, mapped(&memory(seals)))
}

fn watch<T>(cancel: Cancel, act: impl FnOnce(Watch<'_>) -> T) -> T {
    act(Watch { progress: &mut |_| {}, cancel, record: Box::new(NoRecord) })
}

type Arrival = Result<Arrived<FakeArrival>, Box<Failure>>;

/// What comes of `host` while `act` does something at the socket that it waits at.
fn beside<T>(mut host: FakeHost, act: impl FnOnce(&Path) -> T) -> (T, Arrival) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (cancel, waits) = (Cancel::new(), Cancel::new());
    let cancelled = waits.clone();
    thread::scope(|threads| {
        let there = thread::Builder::new();
        let there = there.spawn_scoped(threads, move || {
            watch(waits, |watch| receive(&mut host, listener, &patience(), watch))
        });
        let done = act(&path);
        drop(cancel);
        thread::sleep(Duration::from_millis(300));
        cancelled.cancel();
        (done, there.unwrap().join().unwrap())
    })
}

fn moved(guest: &mut FakeGuest, host: FakeHost) -> (Result<Report, Box<Failure>>, Arrival) {
    beside(host, |path| {
        let connect = |_: &Cancel| UnixStream::connect(path);
        watch(Cancel::new(), |watch| send(guest, connect, &shared(), watch))
    })
}

fn host(world: &Arc<World>, fault: Fault) -> FakeHost {
    FakeHost { world: world.clone(), fault, low_pages: LOW_PAGES }
}

#[test]
fn a_guest_moves_and_its_memory_stays() {
    let world = Arc::default();
    let mut guest = guest(&world, Fault::Relay, SEALED);
    guest.write_all_the_time(2, 3);
    let (sent, arrived) = moved(&mut guest, host(&world, Fault::None));
    let (report, arrived) = (sent.unwrap(), arrived.unwrap());
    assert_eq!(world.runners(), (false, true));
    assert_eq!(arrived.guest.count, guest.count());
    assert!(content(&arrived.guest.ram) == content(&guest.ram));
    guest.ram.write_slice(b"the same", GuestAddress(PAGE)).unwrap();
    assert!(content(&arrived.guest.ram) == content(&guest.ram), "not a copy");
    assert_eq!((report.pages, report.zero_pages, report.streams), (0, 0, 1));
    assert!(report.bytes_sent < 2048, "{}", report.bytes_sent);
}

#[test]
fn whatever_fails_before_commit_the_guest_goes_on_in_memory_that_nobody_touched() {
    for (here, there, says) in [
        (Fault::StuckDevice, Fault::None, "it does not answer"),
        (Fault::None, Fault::BadState, "cannot move the state"),
        (Fault::None, Fault::NoStart, "gave the guest back"),
        (Fault::None, Fault::Mismatch, "device: wanted"),
    ] {
        let world = Arc::default();
        let mut guest = guest(&world, here, SEALED);
        let before = content(&guest.ram);
        let (sent, arrived) = moved(&mut guest, host(&world, there));
        let error = one_line(&*sent.unwrap_err());
        assert!(error.contains(says), "{error}");
        assert!(arrived.is_err());
        assert_eq!(world.runners(), (true, false), "{says}");
        assert!(content(&guest.ram) == before);
    }
}

#[test]
fn whatever_the_connection_does_shared_memory_has_one_runner() {
    let tried = |limits: &Limits| {
        let world = Arc::default();
        let guest = guest(&world, Fault::None, SEALED);
        let host = host(&world, Fault::None);
        let (mut network, door) = Network::new(*limits, Some(Limits::NONE));
        network.local = true;
        let options = Options { shared: true, ..hasty() };
        try_moving(world, guest, host, (network, door), &options)
    };
    let untouched = content(&guest(&Arc::default(), Fault::None, SEALED).ram);
    let check = |tried: &Tried, case: &str| {
        assert_decided(tried, case);
        assert!(content(&tried.guest.ram) == untouched, "{case}: someone wrote to its memory");
    };
    let whole = tried(&Limits::NONE);
    check(&whole, "no fault");
    let (out, back) = whole.passed;
    assert!(whole.arrived.is_ok() && out < 2048 && back > 100, "{out} bytes, {back} back");
    let faults = |how, step| {
        let outs = (0..out).step_by(step).map(move |out| Limits { out, back: usize::MAX, how });
        let backs = (0..back).step_by(step).map(move |back| Limits { out: usize::MAX, back, how });
        outs.chain(backs).collect::<Vec<_>>()
    };
    for (how, step) in [(Break::Shut, 1), (Break::Flip, 1), (Break::Twice, 7), (Break::Hole, 7)] {
        let (stayed, arrived) = try_each(&faults(how, step), tried, check);
        println!("{how:?}: {stayed} stayed, {arrived} arrived");
        assert!(stayed > 20 && arrived > 5, "{how:?}: {stayed} stayed, {arrived} arrived");
    }
}

#[test]
fn memory_that_could_shrink_is_refused() {
    let world = Arc::default();
    let mut guest = guest(&world, Fault::None, SealFlags::empty());
    let (sent, _) = moved(&mut guest, host(&world, Fault::None));
    let error = one_line(&*sent.unwrap_err());
    assert!(error.contains("memory/shared: wanted a memory file sealed against"), "{error}");
    assert_eq!(world.runners(), (true, false));
}

#[test]
fn memory_is_shared_by_whoever_can_or_not_at_all() {
    let world = Arc::default();
    let in_no_file = FakeGuest::new(&world, Fault::None);
    let network = || Network::new(Limits::NONE, Some(Limits::NONE));
    let tried =
        try_moving(world.clone(), in_no_file, host(&world, Fault::None), network(), &shared());
    assert!(tried.error().contains("only over a Unix socket"), "{}", tried.error());
    assert_eq!(world.runners(), (true, false));
    let mut in_no_file = FakeGuest::new(&world, Fault::None);
    let (sent, _) = moved(&mut in_no_file, host(&world, Fault::None));
    let error = one_line(&*sent.unwrap_err());
    assert!(error.contains("migrate without shared memory: it is no file"), "{error}");
    assert_eq!(world.runners(), (true, false));
}

#[test]
fn memory_in_several_files_is_passed_only_to_those_who_take_them() {
    for (version, arrives) in [(2, false), (3, true)] {
        let world = Arc::default();
        let mut guest = guest(&world, Fault::None, SEALED);
        let (sent, arrived) = beside(host(&world, Fault::None), |path| {
            let older = [(VERSIONS.0, version); 2];
            let connect = |_: &Cancel| Ok(Disguised::new(UnixStream::connect(path)?, older));
            watch(Cancel::new(), |watch| send(&mut guest, connect, &shared(), watch))
        });
        assert_eq!(arrived.is_ok(), arrives);
        assert_eq!(world.runners(), (!arrives, arrives));
        let error = sent.err().map(|failure| one_line(&*failure)).unwrap_or_default();
        assert_eq!(error.contains("several files, and the destination takes one"), !arrives);
    }
}

#[test]
fn a_destination_that_takes_no_memory_is_told_of_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let older = thread::Builder::new().spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut peer = Channel::new(stream, patience().silence, Cancel::new()).unwrap();
        peer.answer_greeting(patience().greeting).unwrap();
    });
    let world = Arc::default();
    let mut guest = guest(&world, Fault::None, SEALED);
    let connect = |_: &Cancel| UnixStream::connect(&path);
    let sent = watch(Cancel::new(), |watch| send(&mut guest, connect, &shared(), watch));
    let error = one_line(&*sent.unwrap_err());
    assert!(error.contains("migrate without shared memory"), "{error}");
    assert_eq!(world.runners(), (true, false));
    older.unwrap().join().unwrap();
}

/// What a destination makes of a peer that shares memory and then does as it likes.
fn visited(by: impl FnOnce(&mut Channel<UnixStream>, &FakeGuest)) -> (Arc<World>, String) {
    let world = Arc::default();
    let guest = guest(&world, Fault::None, SEALED);
    let ((), arrived) = beside(host(&world, Fault::None), |path| {
        let stream = UnixStream::connect(path).unwrap();
        let mut peer = Channel::new(stream, patience().silence, Cancel::new()).unwrap();
        peer.greet(patience().greeting).unwrap();
        by(&mut peer, &guest);
    });
    (world, arrived.err().map(|failure| one_line(&*failure)).unwrap())
}

#[test]
fn a_peer_that_shares_memory_and_lies_gets_nowhere() {
    let limit = patience().greeting;
    let offered = |peer: &mut Channel<UnixStream>, guest: &FakeGuest, streams| {
        peer.send(&Message::Share).unwrap();
        assert_eq!(peer.receive_message(limit).unwrap(), Message::Pass);
        peer.pass_files(&memory(SEALED)).unwrap();
        let offer = crate::compat::Offer { ram: crate::ram::layout(&guest.ram), ..guest.offer() };
        peer.send(&Message::Offer { offer, dry_run: false, streams }).unwrap();
        peer.receive_message(limit)
    };
    let (world, _) = visited(|peer, _| {
        peer.send(&Message::Share).unwrap();
        assert_eq!(peer.receive_message(limit).unwrap(), Message::Pass);
        peer.send(&Message::RoundEnd).unwrap();
        peer.receive_message(limit).unwrap_err();
    });
    assert_eq!(world.runners(), (true, false));
    let (world, _) = visited(|peer, guest| drop(offered(peer, guest, 2).unwrap_err()));
    assert_eq!(world.runners(), (true, false));
    let (world, _) = visited(|peer, guest| {
        offered(peer, guest, 1).unwrap();
        let run = crate::ram::Run { start: GuestAddress(0), len: PAGE };
        peer.send_zero(run).and_then(|()| peer.flush()).unwrap();
        peer.receive_message(limit).unwrap_err();
    });
    assert_eq!(world.runners(), (true, false));
    let (world, error) = visited(|peer, guest| {
        offered(peer, guest, 1).unwrap();
        let mut state = StateWriter::new();
        guest.save(&mut state).unwrap();
        peer.send_state(&state.bytes()[1..]).unwrap();
        peer.send(&Message::End(peer.totals())).unwrap();
        peer.receive_message(limit).unwrap_err();
    });
    assert!(error.contains("cannot move the state"), "{error}");
    assert_eq!(world.runners(), (true, false));
}
