//! The work a guest does while it is migrated: rewrites and checks memory, and reads its clocks.
//!
//! `guest-load MIB THREADS REPORT-FILE` runs until it is killed or finds something wrong. It says
//! what it found on stdout, one line that begins with `guest-load: CORRUPT` or
//! `guest-load: BACKWARDS`, and ends with status 1. Twice a second it replaces REPORT-FILE with one
//! line of `key=value`, so that `cat` can ask how it is.
//!
//! Each thread rests half of the time: on an emulated machine what moves the guest competes with it
//! for the same processors, and shows no more if it gets less of them.
#![expect(
    clippy::disallowed_methods,
    reason = "a worker that finds an error ends the whole program"
)]

use std::fs;
use std::process::exit;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const WORDS_IN_PAGE: usize = 512;
const PAGES_IN_MIB: usize = 256;
/// How often the clocks are read. Each time costs the guest a timer, and the host some exits.
const CLOCKS_EVERY: Duration = Duration::from_millis(5);

/// What the workers did so far.
#[derive(Default)]
struct Tally {
    pages_checked: AtomicU64,
    passes: AtomicU64,
    clock_reads: AtomicU64,
    longest_gap_us: AtomicU64,
}

static TALLY: Tally = Tally {
    pages_checked: AtomicU64::new(0),
    passes: AtomicU64::new(0),
    clock_reads: AtomicU64::new(0),
    longest_gap_us: AtomicU64::new(0),
};

fn main() {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [mib, threads, report] = arguments.as_slice() else { usage() };
    let (Ok(mib), Ok(threads)) = (mib.parse::<usize>(), threads.parse::<usize>()) else { usage() };
    if mib == 0 || threads == 0 {
        usage()
    }
    let pages = mib * PAGES_IN_MIB / threads;
    for worker in 0..threads {
        spawn(format!("memory-{worker}"), move || rewrite_and_check(worker, pages));
    }
    spawn("clock".into(), watch_clocks);
    loop {
        let line = format!(
            "pages={} passes={} clock_reads={} longest_gap_us={}\n",
            TALLY.pages_checked.load(Relaxed),
            TALLY.passes.load(Relaxed),
            TALLY.clock_reads.load(Relaxed),
            TALLY.longest_gap_us.load(Relaxed),
        );
        let next = format!("{report}.next");
        if let Err(error) = fs::write(&next, line).and_then(|()| fs::rename(&next, report)) {
            fail(&format!("cannot write {report}: {error}"));
        }
        thread::sleep(Duration::from_millis(500));
    }
}

fn usage() -> ! {
    eprintln!("usage: guest-load MIB THREADS REPORT-FILE");
    exit(2)
}

fn fail(what: &str) -> ! {
    println!("guest-load: {what}");
    exit(1)
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name).spawn(work) {
        fail(&format!("cannot start a thread: {error}"));
    }
}

/// Checks every word of every page against what was written last, then writes something new.
fn rewrite_and_check(worker: usize, pages: usize) {
    let mut memory = vec![0_u64; pages * WORDS_IN_PAGE];
    for pass in 0_u64.. {
        let since = Instant::now();
        for (page, words) in memory.chunks_exact_mut(WORDS_IN_PAGE).enumerate() {
            if pass > 0 {
                check(worker, page, words, pass - 1);
            }
            let first = seed(worker, page, pass);
            for (index, word) in (0_u64..).zip(words) {
                *word = first.wrapping_add(index);
            }
            TALLY.pages_checked.fetch_add(1, Relaxed);
        }
        TALLY.passes.fetch_add(1, Relaxed);
        thread::sleep(since.elapsed());
    }
}

fn check(worker: usize, page: usize, words: &[u64], pass: u64) {
    let first = seed(worker, page, pass);
    for (index, word) in (0_u64..).zip(words) {
        let want = first.wrapping_add(index);
        if *word != want {
            fail(&format!(
                "CORRUPT worker={worker} page={page} word={index} pass={pass} want={want:016x} have={word:016x}"
            ));
        }
    }
}

/// A value that differs between any two pages and between any two passes.
fn seed(worker: usize, page: usize, pass: u64) -> u64 {
    let place = ((worker as u64) << 40) | page as u64;
    (place ^ pass.rotate_right(16)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Reads the clocks again and again; none may ever go backwards.
fn watch_clocks() {
    let mut monotonic = Instant::now();
    let mut realtime = SystemTime::now();
    let mut cycles = cycles();
    loop {
        let now = Instant::now();
        let Some(gap) = now.checked_duration_since(monotonic) else {
            fail(&format!("BACKWARDS monotonic from {monotonic:?} to {now:?}"))
        };
        let today = SystemTime::now();
        if let Err(error) = today.duration_since(realtime) {
            fail(&format!("BACKWARDS realtime by {:?}", error.duration()))
        }
        let counter = self::cycles();
        if counter < cycles {
            fail(&format!("BACKWARDS tsc from {cycles} to {counter}"))
        }
        let gap = u64::try_from(gap.as_micros()).unwrap_or(u64::MAX);
        TALLY.longest_gap_us.fetch_max(gap, Relaxed);
        TALLY.clock_reads.fetch_add(1, Relaxed);
        (monotonic, realtime, cycles) = (now, today, counter);
        thread::sleep(CLOCKS_EVERY);
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "reads the time-stamp counter")]
fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn cycles() -> u64 {
    0
}
