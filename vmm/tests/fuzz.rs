//! The targets of `vmm/fuzz`, bounded, on any compiler.
//!
//! What is kept in `vmm/fuzz/corpus` and what the targets call valid is run each time, and
//! changed at random for as long as `UVMM_FUZZ_SECONDS` says, three seconds for each target unless
//! it is set. What fails is printed; put it into the corpus. The seed is printed, too: `UVMM_SEED`
//! gives it, and then the same is tried in the same order.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../../devices/src/pci/fuzz/random.rs"]
mod random;
#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use random::Random;
use targets::{TARGETS, Target};

/// Bytes that lengths, numbers and kinds often are.
const TELLING: [u8; 8] = [0, 1, 2, 4, 0x10, 0x7f, 0x80, 0xff];

impl Random {
    /// `data` with a few bytes changed, inserted or removed, or more of `other` behind it.
    fn change(&mut self, data: &[u8], other: &[u8]) -> Vec<u8> {
        let mut data = data.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(data.len() + 1);
            let byte = self.byte(TELLING);
            match self.below(5) {
                0 => data.insert(at, byte),
                1 if at < data.len() => drop(data.remove(at)),
                2 => data.extend(&other[self.below(other.len() + 1)..]),
                3 => data.truncate(at),
                _ => {
                    if let Some(old) = data.get_mut(at) {
                        *old = byte;
                    }
                }
            }
        }
        data.truncate(16 << 10);
        data
    }
}

fn try_it((name, target, _): Target, data: &[u8]) {
    if let Err(why) = catch_unwind(AssertUnwindSafe(|| target(data))) {
        let hex: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{name} fails on: {hex}");
        resume_unwind(why);
    }
}

fn kept(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = std::fs::read_dir(dir).expect("there is a corpus for each target");
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    // Directories have their own order on each machine.
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn nothing_that_is_said_or_saved_does_harm() {
    let seconds = std::env::var("UVMM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let each = Duration::from_secs(seconds.unwrap_or(3));
    for target in TARGETS {
        let (name, _, valid) = target;
        let mut known = [kept(name), valid()].concat();
        known.iter().for_each(|data| try_it(target, data));
        let end = Instant::now() + each;
        let mut random = Random::new();
        let (seeds, mut runs, most) = (known.len(), known.len(), known.len() + 256);
        while Instant::now() < end {
            // What was changed often is hardly like anything any more: half begin anew.
            let from = [seeds, known.len()][random.below(2)];
            let [one, other] = [from, known.len()].map(|count| random.below(count));
            let data = random.change(&known[one], &known[other]);
            try_it(target, &data);
            runs += 1;
            // Long ways begin with small steps: some of what was tried is changed further.
            if known.len() < most {
                known.push(data);
            }
        }
        println!("{name}: {runs} runs");
    }
}

#[test]
fn what_is_valid_goes_all_the_way() {
    const LONG: Duration = Duration::from_secs(60);
    let [(_, _, from_a_source), (_, _, from_a_destination), (_, _, snapshots), ..] = TARGETS;
    let came: Vec<_> = from_a_source().iter().map(|said| targets::take_in(said, LONG)).collect();
    let ran: Vec<_> = came.iter().map(|came| came.runs == 1).collect();
    // The last one asks while it gives: it may get its guest back.
    assert_eq!(ran[..7], [false, false, false, false, true, true, true], "{:?}", came[6].why);
    assert_eq!(came[2].why, came[3].why, "packed memory is as good as any");
    let gave = from_a_destination();
    let gave: Vec<_> = gave.iter().map(|said| targets::give_to(said, LONG)).collect();
    assert_eq!(gave, [false, false, true, true, true, true, false]);
    assert!(snapshots().iter().all(|file| targets::restored(file)));
}

#[test]
#[ignore = "writes what is valid now into the corpus"]
fn keep_what_is_valid() {
    for (name, _, valid) in TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        for (number, data) in valid().iter().enumerate() {
            std::fs::write(dir.join(format!("valid-{number}")), data).unwrap();
        }
    }
}
