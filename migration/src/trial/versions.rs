//! Builds of other versions, and what only some of them know.

use std::sync::Arc;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::disguise::Disguised;
use super::fake::{FakeGuest, FakeHost, Fault, World, content};
use super::journeys::options;
use super::network::{Limits, Network};
use crate::destination::receive;
use crate::error::one_line;
use crate::patience::Cancel;
use crate::progress::{Progress, Stage, Watch};
use crate::ram::PAGE;
use crate::record::NoRecord;
use crate::report::Report;
use crate::source::{Options, send};
use crate::wire::{Compression, VERSIONS};

const PAGES: u64 = 600;

/// Moves a guest over connections whose ends hear these versions of each other; gives the report, or
/// what went wrong.
fn moved(hear: [(u16, u16); 2], options: &Options) -> Result<Report, String> {
    moved_to(Fault::None, hear, options)
}

/// The same, to a host on which this goes wrong.
fn moved_to(fault: Fault, hear: [(u16, u16); 2], options: &Options) -> Result<Report, String> {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::with_memory(&world, Fault::None, PAGES);
    for page in (0..PAGES).filter(|page| page % 100 < 70) {
        guest.ram.write_obj(page + 1, GuestAddress(page * PAGE + page % 400 * 8 + 64)).unwrap();
    }
    let mut host = FakeHost { world: world.clone(), fault, low_pages: PAGES };
    let (network, door) = Network::new(Limits::NONE, None);
    let (patience, done) = (options.patience, Cancel::new());
    let waits = done.clone();
    let destination = thread::Builder::new().spawn(move || {
        let (progress, cancel) = (&mut |_: &Progress| {}, waits);
        receive(&mut host, door, &patience, Watch { progress, cancel, record: Box::new(NoRecord) })
    });
    let connect = |_: &Cancel| Ok(Disguised::new(network.visit(), hear));
    let mut begun = false;
    let progress = &mut |now: &Progress| begun |= now.stage != Stage::Preparing;
    let watch = Watch { progress, cancel: Cancel::new(), record: Box::new(NoRecord) };
    let sent = send(&mut guest, connect, options, watch);
    if let Err(failure) = sent {
        done.cancel();
        assert!(destination.unwrap().join().unwrap().is_err());
        assert_eq!(world.runners(), (true, false));
        assert!(fault == Fault::None || !begun, "it was told too late");
        return Err(one_line(&*failure));
    }
    let arrived = destination.unwrap().join().unwrap().unwrap();
    assert_eq!(world.runners(), (false, true));
    assert!(content(&arrived.guest.ram) == content(&guest.ram), "memory differs");
    Ok(sent.unwrap())
}

const ALL: [Compression; 4] =
    [Compression::None, Compression::Lz4, Compression::Zstd, Compression::Auto];
/// The bytes of memory that have to be sent.
const CONTENT: u64 = PAGES * 7 / 10 * PAGE;

#[test]
fn packed_memory_takes_less_of_the_wire() {
    for (compression, checked, streams) in
        ALL.into_iter().flat_map(|how| [(how, false, 1), (how, true, 3)])
    {
        let options = Options { compression, checked, streams, ..options() };
        let sent = moved([VERSIONS; 2], &options).unwrap();
        let is_packed = sent.bytes_sent < CONTENT / 10;
        // Auto begins with none.
        let packs = [Compression::Lz4, Compression::Zstd].contains(&compression);
        assert_eq!(is_packed, packs, "{compression:?} {sent:?}");
        assert!(sent.pages * PAGE >= CONTENT);
    }
}

#[test]
fn a_build_speaks_to_the_one_before_it_and_to_those_after_it() {
    let options = Options { compression: Compression::Lz4, streams: 2, ..options() };
    let (oldest, newest) = VERSIONS;
    let next = (newest, newest + 1);
    for (theirs, packed) in [((oldest, 1), false), (VERSIONS, true), (next, true), ((1, 99), true)]
    {
        let sent = moved([theirs, VERSIONS], &options).unwrap();
        assert_eq!(sent.bytes_sent < CONTENT / 10, packed, "to {theirs:?}: {sent:?}");
    }
    for theirs in [next, (1, 99)] {
        moved([VERSIONS, theirs], &options).unwrap();
    }
}

#[test]
fn what_was_not_agreed_on_is_refused() {
    let options = Options { compression: Compression::Zstd, ..options() };
    let error = moved([VERSIONS, (1, 1)], &options).unwrap_err();
    assert!(error.contains("closed the connection"), "{error}");
}

#[test]
fn a_state_that_an_older_build_cannot_read_is_refused_before_anything_is_done_to_the_guest() {
    for dry_run in [false, true] {
        let options = Options { dry_run, ..options() };
        let error = moved_to(Fault::OldFormat, [VERSIONS; 2], &options).unwrap_err();
        assert!(error.contains("state/counter: wanted version 1"), "{error}");
        assert!(error.contains("as new as the source's"), "{error}");
    }
}
