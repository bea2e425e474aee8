//! The test programs inside the lab host, in two lanes: one of them has the virtual functions.
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use super::Part;
use super::attempt::{self, Outcome, Outcomes};
use crate::error::{Context, Error, Result};

/// The programs of each lane, which run one after the other beside those of the other lane; the
/// first lane has all that are not named here.
///
/// Only one has virtual functions: the emulated NIC has ended a whole lab host while two guests used
/// functions of the same physical one.
const LANES: [&[&str]; 2] =
    [&[], &["vfio", "hotplug", "evict", "guest_driver", "pause", "mishaps", "promise"]];

/// Runs the tests of `programs`, each at most `tries` times, and shows each line that they print with
/// the name of its program; tells whether all passed.
///
/// # Errors
/// If a program cannot be run.
pub fn run(programs: &[PathBuf], filter: Option<&str>, tries: u8) -> Result<bool> {
    let out = Mutex::new(());
    let drive = |number: usize| -> Result<bool> {
        let mut passed = true;
        for program in programs.iter().filter(|program| lane_of(&name(program)) == number) {
            passed &= go(program, filter, tries, &out)?;
        }
        Ok(passed)
    };
    thread::scope(|scope| {
        let drive = &drive;
        let start = |number| {
            let thread = thread::Builder::new().name(format!("lane-{number}"));
            let thread = thread.spawn_scoped(scope, move || drive(number));
            thread.context(|| "cannot start a thread".into())
        };
        let lanes = (0..LANES.len()).map(start).collect::<Result<Vec<_>>>()?;
        let mut passed = true;
        for lane in lanes {
            passed &= lane.join().map_err(|_| Error::Guest("a lane broke".into()))??;
        }
        Ok(passed)
    })
}

/// The lane of the program called `name`.
fn lane_of(name: &str) -> usize {
    LANES.iter().position(|lane| lane.contains(&name)).unwrap_or(0)
}

/// Runs the tests of one program; tells whether all passed.
fn go(program: &Path, filter: Option<&str>, tries: u8, out: &Mutex<()>) -> Result<bool> {
    let name = name(program);
    let since = Instant::now();
    let say = |line: &str| show(out, &format!("{name:<12} {line}"));
    let mut outcomes = Outcomes::default();
    for test in attempt::tests(program, filter)? {
        let since = Instant::now();
        let outcome = attempt::run(program, &test, tries, say)?;
        let word = if outcome == Outcome::Failed { "FAILED" } else { "passed" };
        say(&format!("{word} {test} ({:.1} s)", since.elapsed().as_secs_f32()));
        outcomes.add(test, outcome);
    }
    let (label, passed) = (format!("in the lab host: {name}"), outcomes.all_passed());
    show(out, &Part::new(&label, passed, since.elapsed(), &outcomes.to_string()).to_string());
    Ok(passed)
}

/// A whole line at a time.
fn show(out: &Mutex<()>, line: &str) {
    let _one = out.lock();
    // Whoever reads it has gone: the tests go on.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// What Cargo calls it.
fn name(program: &Path) -> String {
    let stem = program.file_stem().unwrap_or_default().to_string_lossy();
    stem.rsplit_once('-').map_or(&*stem, |(name, _hash)| name).to_owned()
}
