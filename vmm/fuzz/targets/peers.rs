//! Peers and files that say anything at all.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use migration::handover::Verdict;
use migration::patience::{Cancel, Patience};
use migration::progress::Watch;
use migration::record::NoRecord;
use migration::report::Status;
use migration::snapshot::restore;
use migration::wire::Message;
use migration::{Arrived, Options, receive, send};

use super::machines::{Empty, Guest};
use super::script::{Door, Known, Script, connections, decoded, mended, token};

/// Nobody waits for a script, unless for what it will never say.
const SHORT: Duration = Duration::from_millis(20);

fn patience(each: Duration) -> Patience {
    Patience {
        greeting: each,
        prepare: each,
        silence: each,
        stopped: each,
        running: each,
        settling: Duration::ZERO,
        asking: Duration::ZERO,
        answering: each,
    }
}

fn watched<T>(act: impl FnOnce(Watch<'_>) -> T) -> T {
    act(Watch { progress: &mut |_| {}, cancel: Cancel::new(), record: Box::new(NoRecord) })
}

/// `data` as it is, and with the checksums of its messages made right.
fn both(data: &[u8]) -> Vec<Vec<u8>> {
    let mended = mended(data);
    if mended == data { vec![mended] } else { vec![data.to_vec(), mended] }
}

/// A destination to which anything is said runs the guest once if it was given, and else tells why.
pub(crate) fn destination(data: &[u8]) {
    for said in both(data) {
        let TakenIn { runs, why, heard } = take_in(&said, SHORT);
        assert!(!why.contains('\n'), "{why}");
        let given = || connections(&said).iter().any(|said| has(said, &Message::Commit(token())));
        assert!(runs == 0 || runs == 1 && given(), "it ran {runs} times");
        let answer = |verdict| heard.contains(&Message::Answer(verdict));
        assert!(runs == 0 || !answer(Verdict::Refused), "it runs, and gave it back");
        assert!(runs == 1 || !answer(Verdict::Running), "it says that it runs");
    }
}

fn has(said: &[u8], message: &Message) -> bool {
    decoded(said).contains(message)
}

/// What came of a destination.
pub(crate) struct TakenIn {
    /// How often it let the guest run.
    pub(crate) runs: u32,
    pub(crate) why: String,
    heard: Vec<Message>,
}

/// What comes of a destination to which `data` is said, and which waits so long for `each` thing.
pub(crate) fn take_in(data: &[u8], each: Duration) -> TakenIn {
    let known = Arc::<Known>::default();
    let door = Door::new(data, &known);
    let arrived = watched(|watch| receive(&mut Empty, door, &patience(each), watch));
    let (runs, why) = match arrived {
        Ok(Arrived { guest, answering, homecoming, .. }) => {
            drop(homecoming);
            answering.wait();
            (guest.runs, String::new())
        }
        Err(mut failure) => {
            failure.answering.take().into_iter().for_each(migration::Answering::wait);
            (0, failure.to_string())
        }
    };
    TakenIn { runs, why, heard: known.heard() }
}

/// A source to which anything is said gives the guest away only to who was ready for it.
pub(crate) fn source(data: &[u8]) {
    for said in both(data) {
        let gave = give_to(&said, SHORT);
        let says = |message| connections(&said).iter().any(|said| has(said, &message));
        let runs = || says(Message::Answer(Verdict::Running)) || named(&said);
        assert!(!gave || runs(), "nobody said that it runs there");
    }
}

/// Whether someone says READY and RUNNING of the same migration.
fn named(said: &[u8]) -> bool {
    let all: Vec<_> = connections(said).iter().flat_map(|said| decoded(said)).collect();
    all.iter().any(|message| match message {
        Message::Running(name) => all.contains(&Message::Ready(*name)),
        _ => false,
    })
}

/// Whether a source gave its guest to a destination that said `data`.
pub(crate) fn give_to(data: &[u8], each: Duration) -> bool {
    let all: Vec<_> = connections(data).iter().flat_map(|said| decoded(said)).collect();
    let mut scripts = Script::all(data, &Arc::default());
    let connect =
        |_: &Cancel| scripts.pop_front().ok_or_else(|| io::ErrorKind::ConnectionRefused.into());
    let options = Options {
        patience: patience(each),
        streams: if all.contains(&Message::Joined) { 2 } else { 1 },
        shared: all.contains(&Message::Pass),
        ..Options::default()
    };
    match watched(|watch| send(&mut Guest::new(None), connect, &options, watch)) {
        Ok(report) => report.status == Status::Completed,
        Err(failure) => {
            assert!(!failure.to_string().contains('\n'), "{failure}");
            false
        }
    }
}

/// A file that says anything becomes a guest only if nothing is missing, and nothing too much.
pub(crate) fn snapshot(data: &[u8]) {
    for said in both(data) {
        if !restored(&said) {
            continue;
        }
        assert!(!restored(&said[..said.len() - 1]), "its last byte may be missing");
        assert!(!restored(&[&said[..], &[0]].concat()), "anything may follow it");
    }
}

/// Whether what `file` holds ran.
pub(crate) fn restored(file: &[u8]) -> bool {
    let script = Script::new(file.to_vec(), &Arc::default());
    match watched(|watch| restore(&mut Empty, script, watch)) {
        Ok((guest, _)) => guest.runs == 1,
        Err(failure) => {
            assert!(!failure.to_string().contains('\n'), "{failure}");
            false
        }
    }
}
