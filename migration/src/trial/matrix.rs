//! Every fault at every byte: the guest runs at exactly one place, whole.
//!
//! Whole takes checksums of memory, which a migration has only where it is wished for: the content
//! of a page could be anything. All else, namely headers of frames, messages, the state, and how
//! much came, is checked always; so without them one wrong bit is caught, or does no harm, or is
//! one wrong bit in the guest's memory.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::fake::content;
use super::faults::{assert_decided, moved, places};
use super::journeys::{Tried, options};
use super::network::{Break, Limits};
use crate::report::Status;
use crate::source::Options;

/// How many migrations run at once: they mostly wait.
const THREADS: usize = 8;

/// Patience that thousands of stalled migrations do not need long for; only asking has an answer in
/// the end, however long it takes.
pub(super) fn hasty() -> Options {
    let mut options = Options { checked: true, ..options() };
    let milliseconds = Duration::from_millis;
    options.patience.greeting = milliseconds(300);
    options.patience.prepare = milliseconds(300);
    options.patience.silence = milliseconds(300);
    options.patience.running = milliseconds(100);
    options.patience.asking = milliseconds(30_000);
    options.patience.answering = milliseconds(60_000);
    options
}

/// Tries each of `faults` and has `check` look at what came of it; gives how many guests stayed,
/// and how many arrived.
pub(super) fn try_each<F: Debug + Sync>(
    faults: &[F],
    moved: impl Fn(&F) -> Tried + Sync,
    check: impl Fn(&Tried, &str) + Sync,
) -> (usize, usize) {
    let (next, arrived) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(None);
    let work = || {
        while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            let tried = moved(fault);
            let checked = || check(&tried, &format!("{fault:?}"));
            if let Err(why) = catch_unwind(AssertUnwindSafe(checked)) {
                *failed.lock().unwrap() = Some(why);
                return;
            }
            arrived.fetch_add(usize::from(tried.arrived.is_ok()), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    if let Some(why) = failed.into_inner().unwrap() {
        resume_unwind(why);
    }
    let arrived = arrived.into_inner();
    (faults.len() - arrived, arrived)
}

/// Tries each fault on the first connection.
fn try_first(faults: &[Limits]) -> (usize, usize) {
    let moved = |limits: &Limits| moved(*limits, Some(Limits::NONE), &hasty());
    try_each(faults, moved, assert_decided)
}

/// `how`, in both directions, at each `step`th place.
fn everywhere(how: Break, step: usize) -> Vec<Limits> {
    let (out, back) = moved(Limits::NONE, None, &hasty()).passed;
    assert!(out > 12_000 && back > 100, "{out} bytes out, {back} back");
    let out = places(out).step_by(step).map(|out| Limits { out, back: usize::MAX, how });
    let back = (0..back).step_by(step).map(|back| Limits { out: usize::MAX, back, how });
    out.chain(back).collect()
}

#[test]
fn one_wrong_bit_anywhere_leaves_one_runner() {
    let faults = everywhere(Break::Flip, 1);
    let (stayed, arrived) = try_first(&faults);
    println!("{} runs: {stayed} stayed, {arrived} arrived", faults.len());
    assert!(stayed > 500 && arrived > 30, "{stayed} stayed, {arrived} arrived");
}

#[test]
fn one_wrong_bit_without_checksums_is_caught_everywhere_but_in_memory() {
    let options = Options { checked: false, ..hasty() };
    let moved = |limits: &Limits| moved(*limits, Some(Limits::NONE), &options);
    let wrong = AtomicUsize::new(0);
    let check = |tried: &Tried, case: &str| {
        let Ok(arrived) = &tried.arrived else { return assert_decided(tried, case) };
        assert_eq!(tried.world.runners(), (false, true), "{case}: {}", tried.error());
        assert_eq!(tried.status(), Status::Completed, "{case}: {}", tried.error());
        assert_eq!(arrived.guest.count, tried.guest.count(), "{case}: another state");
        let [there, here] = [&arrived.guest.ram, &tried.guest.ram].map(content);
        let bits = there.iter().zip(&here).map(|(there, here)| (there ^ here).count_ones());
        let bits: u32 = bits.sum();
        assert!(bits <= 1, "{case}: {bits} bits of memory are wrong");
        wrong.fetch_add(usize::from(bits == 1), Ordering::Relaxed);
    };
    let faults = everywhere(Break::Flip, 1);
    let (stayed, arrived) = try_each(&faults, moved, check);
    let wrong = wrong.into_inner();
    println!("{stayed} stayed, {arrived} arrived, {wrong} of them with a wrong bit");
    assert!(stayed > 200 && arrived > wrong && wrong > 100, "{stayed}, {arrived}, {wrong}");
}

#[test]
fn what_comes_twice_late_or_out_of_order_leaves_one_runner() {
    for how in [Break::Twice, Break::Swap, Break::Late] {
        let faults = everywhere(how, 5);
        let (stayed, arrived) = try_first(&faults);
        println!("{how:?}: {} runs: {stayed} stayed, {arrived} arrived", faults.len());
        // What is late arrives in time, unless this machine is so slow that it does not.
        let few = arrived / 20;
        assert!(if how == Break::Late { stayed <= few } else { stayed > 50 }, "{how:?}: {stayed}");
        assert!(arrived > 5, "{how:?}: {arrived}");
    }
}

#[test]
fn what_vanishes_from_any_byte_on_leaves_one_runner() {
    let faults = everywhere(Break::Hole, 5);
    let (stayed, arrived) = try_first(&faults);
    println!("{} runs: {stayed} stayed, {arrived} arrived", faults.len());
    assert!(stayed > 100 && arrived > 5, "{stayed} stayed, {arrived} arrived");
}
