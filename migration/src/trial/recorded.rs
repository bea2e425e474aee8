//! What earlier builds put on the wire and into files: every later one has to read it.
//!
//! A recording is never changed. Where a version of the protocol is new, it gets one of its own:
//! `cargo test -p migration record_anew -- --ignored` writes to `recorded` what is not there yet.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use super::disguise::Disguised;
use super::fake::{FakeArrival, FakeGuest, FakeHost, Fault, LOW_PAGES, World, content};
use super::network::{Limits, Network};
use crate::destination::{Arrived, receive};
use crate::error::Failure;
use crate::patience::{Cancel, Patience};
use crate::progress::Watch;
use crate::record::NoRecord;
use crate::snapshot::{Afterwards, restore, save};
use crate::source::{Options, send};
use crate::wire::{Channel, Compression, Hello, Message, VERSIONS};

/// How often the fake guest had counted when it was recorded.
const COUNT: u64 = 41;
/// The last message of a recorded stream: what follows depends on the destination's token.
const COMMIT_BYTES: usize = 16 + 17 + 4;
/// The same of DONE, behind it.
const DONE_BYTES: usize = COMMIT_BYTES;

fn recordings() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/trial/recorded")
}

fn watched<T>(act: impl FnOnce(Watch<'_>) -> T) -> T {
    let record = Box::new(NoRecord);
    act(Watch { progress: &mut |_| {}, cancel: Cancel::new(), record })
}

fn host(world: &Arc<World>) -> FakeHost {
    FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES }
}

/// Asserts that what was recorded is all there.
fn assert_whole(guest: &FakeArrival) {
    let expected = FakeGuest::new(&Arc::default(), Fault::None);
    assert!(content(&guest.ram) == content(&expected.ram), "memory differs");
    assert_eq!(guest.count, COUNT);
}

/// Plays `recorded` to a destination of this build, and gives the guest away to it.
fn played(recorded: Vec<u8>) -> Result<Arrived<FakeArrival>, Box<Failure>> {
    let world = Arc::<World>::default();
    let mut host = host(&world);
    let (network, door) = Network::new(Limits::NONE, None);
    let stream = network.visit();
    let source = thread::Builder::new().spawn(move || {
        let mut wire = stream.try_clone().unwrap();
        // Not in one go: the destination reads it while it answers.
        let writer = thread::Builder::new().spawn(move || {
            let _refused = wire.write_all(&recorded);
        });
        let silence = Patience::default().silence;
        let mut peer = Channel::new(stream, silence, Cancel::new()).unwrap();
        let told = peer.greeted(silence).and_then(|()| {
            loop {
                match peer.receive_message(silence)? {
                    Message::Ready(token) => {
                        peer.send(&Message::Commit(token))?;
                        assert_eq!(peer.receive_message(silence)?, Message::Running(token));
                        return peer.send(&Message::Done(token));
                    }
                    Message::Accepted(_) | Message::RoundTaken => {}
                    other => return Err(peer.unexpected(&other)),
                }
            }
        });
        writer.unwrap().join().unwrap();
        told
    });
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let ended = thread::Builder::new().spawn(move || {
        let told = source.unwrap().join().unwrap();
        if told.is_err() {
            stop.cancel();
        }
    });
    let watch = Watch { progress: &mut |_| {}, cancel, record: Box::new(NoRecord) };
    let arrived = receive(&mut host, door, &Patience::default(), watch);
    ended.unwrap().join().unwrap();
    assert_eq!(world.runners(), (false, arrived.is_ok()));
    arrived
}

#[test]
fn streams_of_every_version_are_read() {
    for version in VERSIONS.0..=VERSIONS.1 {
        let stream = fs::read(recordings().join(format!("stream-{version}"))).unwrap();
        assert_eq!(stream[10..12], version.to_le_bytes(), "the newest that its build spoke");
        assert_whole(&played(stream).unwrap().guest);
    }
}

#[test]
fn snapshots_of_every_version_are_read() {
    for version in VERSIONS.0..=VERSIONS.1 {
        let file = fs::File::open(recordings().join(format!("snapshot-{version}"))).unwrap();
        let world = Arc::<World>::default();
        let restored = watched(|watch| restore(&mut host(&world), file, watch));
        assert_whole(&restored.unwrap().0);
        assert_eq!(world.runners(), (false, true));
    }
}

/// What a source says that speaks no newer `version`, up to END.
fn stream(version: u16) -> Vec<u8> {
    let versions = (VERSIONS.0, version);
    let world = Arc::<World>::default();
    let (network, door) = Network::new(Limits::NONE, None);
    let mut host = host(&world);
    let destination = thread::Builder::new()
        .spawn(move || watched(|watch| receive(&mut host, door, &Patience::default(), watch)));
    let mut said = None;
    let connect = |_: &Cancel| {
        let stream = Disguised::new(network.visit(), [versions; 2]);
        said = Some(stream.said());
        Ok(stream)
    };
    let mut guest = FakeGuest::new(&world, Fault::None);
    let options = Options { checked: true, compression: Compression::Lz4, ..Options::default() };
    watched(|watch| send(&mut guest, connect, &options, watch)).unwrap();
    destination.unwrap().join().unwrap().unwrap();
    let said = said.unwrap();
    let said = said.lock().unwrap();
    said[..said.len() - COMMIT_BYTES - DONE_BYTES].to_vec()
}

/// What a source writes into a file that speaks no newer `version`.
fn snapshot(version: u16) -> Vec<u8> {
    let mut file = tempfile::tempfile().unwrap();
    let (mut guest, kept) = (FakeGuest::new(&Arc::default(), Fault::None), file.try_clone());
    let kept = kept.unwrap();
    watched(|watch| save(&mut guest, kept, || Ok(()), Afterwards::Stand, watch)).unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let hello = Hello { versions: (VERSIONS.0, version) }.encode();
    bytes[..hello.len()].copy_from_slice(&hello);
    bytes
}

#[test]
fn what_this_build_says_can_be_played_to_it() {
    for version in VERSIONS.0..=VERSIONS.1 {
        assert_whole(&played(stream(version)).unwrap().guest);
    }
}

#[test]
fn a_recording_that_is_bent_is_not_taken_in() {
    let stream = stream(VERSIONS.1);
    for at in [20, stream.len() / 2, stream.len() - 30] {
        let mut bent = stream.clone();
        bent[at] ^= 1;
        assert!(played(bent).is_err(), "at {at}");
    }
}

#[test]
#[ignore = "writes files: for a new version of the protocol only"]
fn record_anew() {
    for version in VERSIONS.0..=VERSIONS.1 {
        for (name, bytes) in [("stream", stream(version)), ("snapshot", snapshot(version))] {
            match fs::File::create_new(recordings().join(format!("{name}-{version}"))) {
                Ok(mut file) => file.write_all(&bytes).unwrap(),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::AlreadyExists),
            }
        }
    }
}
