//! The test programs inside the lab host, in two lanes: each has a processor of the lab host for its
//! guests, and one of them the virtual functions.
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use super::Part;
use crate::error::{Context, Error, Result};
use crate::vm::PROCESSOR;

/// Programs that run one after the other, beside those of the other lane.
struct Lane {
    /// What they are called; the first lane has all that are not named here.
    programs: &'static [&'static str],
    /// The processor of the lab host for their guests.
    processor: &'static str,
}

/// Only one of them has virtual functions: the emulated NIC has ended a whole lab host while two
/// guests used functions of the same physical one.
const LANES: [Lane; 2] = [
    Lane { programs: &[], processor: "0" },
    Lane {
        programs: &["vfio", "hotplug", "evict", "guest_driver", "pause", "promise"],
        processor: "1",
    },
];

/// Runs `programs`, and shows each line that they print with the name of its program; tells whether
/// all passed.
///
/// # Errors
/// If a program cannot be run.
pub fn run(programs: &[PathBuf], filter: Option<&str>) -> Result<bool> {
    let out = Mutex::new(());
    let drive = |number: usize| -> Result<bool> {
        let mut passed = true;
        for program in programs.iter().filter(|program| lane_of(&name(program)) == number) {
            passed &= go(program, &LANES[number], filter, &out)?;
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
    LANES.iter().position(|lane| lane.programs.contains(&name)).unwrap_or(0)
}

/// Runs one program; tells whether all its tests passed.
fn go(program: &Path, lane: &Lane, filter: Option<&str>, out: &Mutex<()>) -> Result<bool> {
    let name = name(program);
    let since = Instant::now();
    let mut command = Command::new(program);
    command.args(["--test-threads=1", "--show-output"]).args(filter);
    command.env(PROCESSOR, lane.processor).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context(|| format!("cannot run {}", program.display()))?;
    let mut said = String::new();
    let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).split(b'\n');
    for line in lines {
        let line = line.context(|| format!("cannot read what {name} prints"))?;
        let line = String::from_utf8_lossy(&line);
        if let Some(result) = line.strip_prefix("test result: ") {
            said = result.split("; 0 measured").next().unwrap_or(result).to_owned();
        }
        show(out, &format!("{name:<12} {line}"));
    }
    let status = child.wait().context(|| format!("cannot wait for {name}"))?;
    let part =
        Part::new(&format!("in the lab host: {name}"), status.success(), since.elapsed(), &said);
    show(out, &part.to_string());
    Ok(status.success())
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
