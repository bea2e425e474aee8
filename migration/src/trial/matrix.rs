//! Every fault at every byte: the guest runs at exactly one place, whole.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::faults::{assert_decided, moved, places};
use super::journeys::options;
use super::network::{Break, Limits};
use crate::source::Options;

/// How many migrations run at once: they mostly wait.
const THREADS: usize = 4;

/// Patience that thousands of stalled migrations do not need long for.
fn hasty() -> Options {
    let mut options = Options { checked: true, ..options() };
    let milliseconds = Duration::from_millis;
    options.patience.greeting = milliseconds(300);
    options.patience.prepare = milliseconds(300);
    options.patience.silence = milliseconds(300);
    options.patience.running = milliseconds(100);
    options.patience.asking = milliseconds(3000);
    options.patience.answering = milliseconds(6000);
    options
}

/// Tries each fault; gives how many guests stayed, and how many arrived.
fn try_each(faults: &[Limits]) -> (usize, usize) {
    let (next, arrived) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(None);
    let work = || {
        while let Some(limits) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            let tried = moved(*limits, Some(Limits::NONE), &hasty());
            let case = format!("{limits:?}");
            let decided = || assert_decided(&tried, &case);
            if let Err(why) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(decided)) {
                *failed.lock().unwrap() = Some(why);
                return;
            }
            arrived.fetch_add(usize::from(tried.arrived.is_ok()), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    if let Some(why) = failed.into_inner().unwrap() {
        std::panic::resume_unwind(why);
    }
    let arrived = arrived.into_inner();
    (faults.len() - arrived, arrived)
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
    let (stayed, arrived) = try_each(&faults);
    println!("{} runs: {stayed} stayed, {arrived} arrived", faults.len());
    assert!(stayed > 500 && arrived > 30, "{stayed} stayed, {arrived} arrived");
}

#[test]
fn what_comes_twice_late_or_out_of_order_leaves_one_runner() {
    for how in [Break::Twice, Break::Swap, Break::Late] {
        let faults = everywhere(how, 5);
        let (stayed, arrived) = try_each(&faults);
        println!("{how:?}: {} runs: {stayed} stayed, {arrived} arrived", faults.len());
        assert!(if how == Break::Late { stayed == 0 } else { stayed > 50 }, "{how:?}: {stayed}");
        assert!(arrived > 5, "{how:?}: {arrived}");
    }
}

#[test]
fn what_vanishes_from_any_byte_on_leaves_one_runner() {
    let faults = everywhere(Break::Hole, 5);
    let (stayed, arrived) = try_each(&faults);
    println!("{} runs: {stayed} stayed, {arrived} arrived", faults.len());
    assert!(stayed > 100 && arrived > 5, "{stayed} stayed, {arrived} arrived");
}
