//! Guests that are written to files, and files that are no guests.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::fake::{FakeArrival, FakeGuest, FakeHost, Fault, HIGH_PAGES, LOW_PAGES, World, content};
use crate::error::{Failure, one_line};
use crate::patience::Cancel;
use crate::plan::{Meanwhile, Phase, Priority, Step, StepFailure};
use crate::progress::Watch;
use crate::record::NoRecord;
use crate::report::{Report, Status};
use crate::snapshot::{Afterwards, restore, save};

/// How a file is made to last, or not.
type Keep = fn() -> io::Result<()>;

fn watched<T>(act: impl FnOnce(Watch<'_>) -> T) -> T {
    let record = Box::new(NoRecord);
    act(Watch { progress: &mut |_| {}, cancel: Cancel::new(), record })
}

fn saved(
    guest: &mut FakeGuest,
    path: &Path,
    afterwards: Afterwards,
) -> Result<Report, Box<Failure>> {
    let file = File::create(path).unwrap();
    watched(|watch| save(guest, file, || Ok(()), afterwards, watch))
}

fn restored(world: &Arc<World>, path: &Path) -> Result<FakeArrival, String> {
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let file = File::open(path).unwrap();
    let guest = watched(|watch| restore(&mut host, file, watch));
    guest.map(|(guest, _)| guest).map_err(|failure| one_line(&*failure))
}

/// A snapshot of a guest that was stopped for it.
fn snapshot() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("it");
    let mut guest = FakeGuest::new(&Arc::default(), Fault::None);
    saved(&mut guest, &path, Afterwards::Stand).unwrap();
    fs::read(path).unwrap()
}

/// What comes of restoring `bytes`, and whether the guest ran.
fn of_bytes(bytes: &[u8]) -> (Result<FakeArrival, String>, bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("it");
    fs::write(&path, bytes).unwrap();
    let world = Arc::<World>::default();
    let outcome = restored(&world, &path);
    let (_, there) = world.runners();
    (outcome, there)
}

#[test]
fn a_guest_goes_on_after_its_snapshot_and_what_is_restored_is_as_it_was() {
    let (dir, world) = (tempfile::tempdir().unwrap(), Arc::<World>::default());
    let path = dir.path().join("it");
    let mut guest = FakeGuest::new(&world, Fault::Relay);
    guest.write_all_the_time(2, 3);
    let report = saved(&mut guest, &path, Afterwards::Run).unwrap();
    assert_eq!(report.status, Status::Completed);
    assert_eq!(world.runners(), (true, false));
    let copies = [(), ()].map(|()| restored(&Arc::default(), &path).unwrap());
    let told = report.pages + report.zero_pages;
    assert_eq!(told, LOW_PAGES + HIGH_PAGES);
    assert!(content(&copies[0].ram) == content(&copies[1].ram), "each is the same");
    assert_eq!(copies[0].count, copies[1].count);
    let relayed = &content(&copies[0].ram)[usize::try_from(LOW_PAGES).unwrap() * 4096..][..7];
    assert_eq!(relayed, b"relayed", "the plan was followed");
}

#[test]
fn a_guest_that_ends_with_its_snapshot_stands_still_and_is_all_in_it() {
    let (dir, world) = (tempfile::tempdir().unwrap(), Arc::<World>::default());
    let path = dir.path().join("it");
    let mut guest = FakeGuest::new(&world, Fault::None);
    guest.write_all_the_time(2, 3);
    saved(&mut guest, &path, Afterwards::Stand).unwrap();
    assert_eq!(world.runners(), (false, false));
    let copy = restored(&world, &path).unwrap();
    assert_eq!(world.runners(), (false, true));
    assert!(content(&copy.ram) == content(&guest.ram));
    assert_eq!(copy.count, guest.count());
}

#[test]
fn a_snapshot_that_cannot_be_written_lets_the_guest_go_on() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let kept = || File::create(dir.path().join("it")).unwrap();
    let lost = || Err(io::ErrorKind::StorageFull.into());
    let cases: [(Fault, File, Keep, &str); 4] = [
        (Fault::None, full, || Ok(()), "cannot write the snapshot"),
        (Fault::None, kept(), lost, "cannot write the snapshot"),
        (Fault::LateWriter, kept(), || Ok(()), "wrote guest memory"),
        (Fault::StuckDevice, kept(), || Ok(()), "it does not answer"),
    ];
    for (fault, file, keep, says) in cases {
        let world = Arc::<World>::default();
        let mut guest = FakeGuest::new(&world, fault);
        let outcome = watched(|watch| save(&mut guest, file, keep, Afterwards::Stand, watch));
        let error = one_line(&*outcome.unwrap_err());
        assert!(error.contains(says), "{fault:?}: {error}");
        assert_eq!(world.runners(), (true, false), "{fault:?}");
    }
}

#[test]
fn a_guest_that_was_not_wished_to_be_written_any_more_goes_on() {
    struct Wish(Cancel);
    impl Step for Wish {
        fn name(&self) -> String {
            "wish to stop".into()
        }
        fn enter(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
            self.0.cancel();
            Ok(())
        }
        fn undo(&mut self) {}
    }
    let (dir, world, cancel) = (tempfile::tempdir().unwrap(), Arc::default(), Cancel::new());
    let mut guest = FakeGuest::new(&world, Fault::None);
    guest.plan.at(Phase::Quiesce, Priority::RELAYS, Wish(cancel.clone()));
    let file = File::create(dir.path().join("it")).unwrap();
    let watch = Watch { progress: &mut |_| {}, cancel, record: Box::new(NoRecord) };
    let failure = save(&mut guest, file, || Ok(()), Afterwards::Stand, watch).unwrap_err();
    assert_eq!(failure.report.status, Status::Cancelled);
    assert_eq!(world.runners(), (true, false));
}

#[test]
fn what_is_no_snapshot_is_refused_in_words_about_a_file() {
    let mut whole = snapshot();
    let (guest, runs) = of_bytes(&whole);
    assert!(guest.is_ok() && runs);
    whole.push(0);
    let mut newer = snapshot();
    newer[8..12].copy_from_slice(&[9, 0, 9, 0]);
    let cases: [(&[u8], &str); 4] = [
        (&whole, "behind the end"),
        (&newer, "restore it with the uvmm that wrote it"),
        (b"ELF", "it is no snapshot of uvmm (its first bytes are \"ELF\")"),
        (b"", "it ends too early"),
    ];
    for (bytes, says) in cases {
        let (outcome, runs) = of_bytes(bytes);
        let error = outcome.err().unwrap();
        assert!(error.contains(says) && !error.contains("peer"), "{error}");
        assert!(!runs);
    }
}

#[test]
fn a_snapshot_that_this_host_cannot_take_is_refused_with_everything_against_it() {
    let (dir, world) = (tempfile::tempdir().unwrap(), Arc::<World>::default());
    let path = dir.path().join("it");
    fs::write(&path, snapshot()).unwrap();
    for (fault, low_pages, says) in [
        (Fault::Mismatch, LOW_PAGES, "device: wanted"),
        (Fault::None, LOW_PAGES + 1, "memory: wanted"),
        (Fault::BadState, LOW_PAGES, "cannot move the state"),
    ] {
        let mut host = FakeHost { world: world.clone(), fault, low_pages };
        let file = File::open(&path).unwrap();
        let failure = watched(|watch| restore(&mut host, file, watch)).err().unwrap();
        let error = one_line(&*failure);
        assert!(error.contains(says), "{error}");
        assert_eq!(world.runners(), (false, false));
    }
}

#[test]
fn a_snapshot_cut_anywhere_does_not_run() {
    let whole = snapshot();
    for cut in (0..whole.len()).step_by(61).chain(whole.len() - 40..whole.len()) {
        let (outcome, runs) = of_bytes(&whole[..cut]);
        assert!(outcome.is_err() && !runs, "cut at {cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_snapshot_with_a_wrong_bit_does_not_run(at: prop::sample::Index, bit in 0..8_u32) {
        let mut bytes = snapshot();
        let at = at.index(bytes.len());
        // Behind the versions there are four bytes that mean nothing, and a newer build is no harm.
        prop_assume!(!(8..16).contains(&at));
        bytes[at] ^= 1 << bit;
        let (outcome, runs) = of_bytes(&bytes);
        prop_assert!(outcome.is_err() && !runs, "byte {} bit {}", at, bit);
    }

    #[test]
    fn no_file_makes_the_reader_panic(tail: Vec<u8>, kept: prop::sample::Index) {
        let mut bytes = snapshot();
        bytes.truncate(kept.index(bytes.len()));
        bytes.extend(tail);
        let (_, runs) = of_bytes(&bytes);
        prop_assert!(!runs);
    }
}
