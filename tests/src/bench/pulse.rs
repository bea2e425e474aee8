//! Whether a guest lives, seen from outside: in the words that the tiny guest keeps rewriting.
//!
//! A guest's own clocks stand still while it moves, so it cannot tell how long it stood. Its
//! memory can be read by whoever may trace its VMM, and tells it of every VMM in the same way.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::resident_mib;
use crate::error::{Context, Error, Result, reading};

/// Between two looks.
const BEAT: Duration = Duration::from_micros(300);
/// Between two looks at how large the VMMs are.
const SIZES: Duration = Duration::from_millis(10);
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// The file that a guest of uvmm has its first memory in.
const FIRST_FILE: &str = "/memfd:guest-ram-0 ";
/// What the tiny guest multiplies page numbers and generations by (`pattern.c`), and its inverse
/// modulo 2^64.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
const UNSPREAD: u64 = inverse(SPREAD);

/// What was seen of a migration.
#[derive(Debug)]
pub(super) struct Seen {
    /// From the last write of the guest here to its first there; none if it was not seen there.
    pub(super) downtime: Option<Duration>,
    /// How much larger each VMM became than it was before, guest memory apart.
    pub(super) growth_mib: f64,
}

/// Where to look in a guest of `bytes` of memory that keeps rewriting its first `rewritten_mib`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) bytes: u64,
    pub(super) rewritten_mib: u64,
}

/// Watches a guest move from process `from` to process `to` while `moving` runs.
pub(super) fn watch<T>(
    [from, to]: [u32; 2],
    place: Place,
    moving: impl FnOnce() -> Result<T>,
) -> Result<(T, Seen)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| look([from, to], place, &done));
        let moved = moving();
        done.store(true, Ordering::Release);
        let seen = watching.join().expect("looking does not panic")?;
        Ok((moved?, seen.conclude()))
    })
}

/// All that was noted.
struct Notes {
    /// The last time that the guest moved on at the source, and how far it was.
    last: (Instant, u64),
    /// Each time that its memory changed at the destination, and how far it was.
    there: Vec<(Instant, u64)>,
    growth_mib: f64,
}

impl Notes {
    fn conclude(self) -> Seen {
        let (stopped, count) = self.last;
        let first = self.there.iter().find(|(at, there)| *at > stopped && *there > count);
        let downtime = first.map(|(started, _)| *started - stopped);
        Seen { downtime, growth_mib: self.growth_mib }
    }
}

fn look([from, to]: [u32; 2], place: Place, done: &AtomicBool) -> Result<Notes> {
    let source = Memory::of(from, place)?
        .ok_or_else(|| Error::Guest(format!("process {from} has no guest memory")))?;
    let before = [resident_mib(from)?, resident_mib(to)?];
    let mut notes =
        Notes { last: (Instant::now(), source.count()), there: Vec::new(), growth_mib: 0.0 };
    let (mut destination, mut sized, mut until) = (None, Instant::now(), None);
    loop {
        let now = Instant::now();
        let count = source.count();
        if count > notes.last.1 {
            notes.last = (now, count);
        }
        if destination.is_none() {
            destination = Memory::of(to, place)?;
        }
        let there = destination.as_ref().map_or(0, Memory::count);
        if notes.there.last().is_none_or(|(_, last)| *last != there) {
            notes.there.push((now, there));
        }
        if now - sized > SIZES {
            sized = now;
            for (pid, before) in [from, to].into_iter().zip(before) {
                // Whoever is gone has stopped growing.
                notes.growth_mib = notes.growth_mib.max(resident_mib(pid).unwrap_or(0.0) - before);
            }
        }
        if done.load(Ordering::Acquire) {
            // A guest that is said to have moved shows it soon, or never.
            let until = *until.get_or_insert(now + Duration::from_secs(2));
            if there > notes.last.1 || now > until {
                return Ok(notes);
            }
        }
        thread::sleep(BEAT);
    }
}

/// The memory of a guest, in the process of its VMM.
struct Memory {
    file: File,
    /// Where the words are that are looked at, and what their values are exclusive-or'ed with.
    words: Vec<(u64, u64)>,
}

impl Memory {
    /// None if the process has mapped none yet.
    fn of(pid: u32, place: Place) -> Result<Option<Self>> {
        let maps = PathBuf::from(format!("/proc/{pid}/maps"));
        let maps = fs::read_to_string(&maps).context(|| reading(&maps))?;
        let Some(start) = guest_memory(&maps, place.bytes) else { return Ok(None) };
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let file = File::open(&path).context(|| reading(&path))?;
        // The set starts behind the guest's own image, below 1.25 MiB.
        // It is looked at as far as uvmm has it in its first file.
        let past = (place.rewritten_mib * MIB + MIB / 2).min(place.bytes / 16);
        let first = MIB + MIB / 4;
        let looks = (16 * place.rewritten_mib).min(128);
        let step = (past - first) / looks / PAGE * PAGE;
        let word = |look: u64| {
            let page = first + look * step;
            let hash = (page / PAGE).wrapping_mul(SPREAD);
            (start + page + (hash >> 57) * 8, hash)
        };
        Ok(Some(Self { file, words: (0..looks).map(word).collect() }))
    }

    /// How often the words that are looked at were rewritten, all together.
    fn count(&self) -> u64 {
        let generation = |&(at, hash): &(u64, u64)| {
            let mut word = [0; 8];
            self.file.read_exact_at(&mut word, at).ok()?;
            let key = (u64::from_le_bytes(word) ^ hash).wrapping_mul(UNSPREAD);
            (key >> 32 == SEED).then_some(key & 0xffff_ffff)
        };
        self.words.iter().filter_map(generation).sum()
    }
}

/// What the guest must be told to fill its memory with.
pub(super) const SEED: u64 = 1;

/// Where guest memory of `bytes` starts. uvmm's is in several files, of which the first is mapped
/// there; another VMM's is the end of the smallest mapping that can hold it, as a neighbour may have
/// been merged into its start.
fn guest_memory(maps: &str, bytes: u64) -> Option<u64> {
    let mapping = |line: &str| {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        rights.starts_with("rw").then_some((hex(start)?, hex(end)?))
    };
    let first = maps.lines().find(|line| line.contains(FIRST_FILE)).and_then(mapping);
    first.map(|(start, _)| start).or_else(|| {
        let sized = maps.lines().filter_map(mapping).map(|(start, end)| (end - start, end));
        let (_, end) = sized.filter(|(size, _)| *size >= bytes).min()?;
        Some(end - bytes)
    })
}

const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut round = 0;
    // Each round doubles the bits that are right, of which there are three at first.
    while round < 5 {
        inverse = inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)));
        round += 1;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreading_can_be_undone() {
        assert_eq!(SPREAD.wrapping_mul(UNSPREAD), 1);
    }

    #[test]
    fn guest_memory_is_the_first_file_or_the_end_of_the_smallest_mapping_that_can_hold_it() {
        let maps = "1000-2000 r-xp 0 0 0 /bin/vmm\n\
                    7000000-7600000 rw-p 00000000 00:00 0\n\
                    8000000-8480000 rw-p 00000000 00:00 0 \n\
                    9000000-9400000 r--p 00000000 00:00 0\n";
        assert_eq!(guest_memory(maps, 0x40_0000), Some(0x808_0000));
        assert_eq!(guest_memory(maps, 0x80_0000), None);
        let files = "5000000-5400000 rw-s 0 0:1 2 /memfd:guest-ram-1 (deleted)\n\
                     6000000-6100000 rw-s 0 0:1 1 /memfd:guest-ram-0 (deleted)\n";
        assert_eq!(guest_memory(&format!("{maps}{files}"), 0x40_0000), Some(0x600_0000));
    }

    #[test]
    fn downtime_is_from_the_last_sign_here_to_the_first_there() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // What is copied while it stands is no sign of life.
        let there = vec![(at(90), 40), (at(101), 70), (at(104), 100), (at(112), 101)];
        let notes = Notes { last: (at(100), 100), there, growth_mib: 0.0 };
        assert_eq!(notes.conclude().downtime, Some(Duration::from_millis(12)));
        let dead = Notes { last: (at(100), 100), there: vec![(at(104), 100)], growth_mib: 0.0 };
        assert_eq!(dead.conclude().downtime, None);
    }
}
