//! The test programs inside the lab host, in two lanes: each has a processor of the lab host for its
//! guests, and one of the two has the virtual functions for itself.
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use super::Part;
use crate::error::{Context, Error, Result};
use crate::vm::PROCESSOR;

/// Programs whose guests have virtual functions: one after the other, as there are few.
const WITH_FUNCTIONS: [&str; 6] = ["vfio", "hotplug", "evict", "guest_driver", "pause", "promise"];

/// Runs `programs`, and shows each line that they print with the name of its program; tells whether
/// all passed.
///
/// # Errors
/// If a program cannot be run.
pub fn run(programs: &[PathBuf], filter: Option<&str>) -> Result<bool> {
    let (first, second): (Vec<_>, Vec<_>) =
        programs.iter().partition(|program| !WITH_FUNCTIONS.contains(&&*name(program)));
    let out = Mutex::new(());
    let lane = |number: usize, programs: Vec<&PathBuf>| -> Result<bool> {
        let mut passed = true;
        for program in programs {
            passed &= go(program, number, filter, &out)?;
        }
        Ok(passed)
    };
    thread::scope(|scope| {
        let other = thread::Builder::new().name("lane".into());
        let other = other.spawn_scoped(scope, || lane(1, second));
        let other = other.context(|| "cannot start a thread".into())?;
        let first = lane(0, first)?;
        let second = other.join().map_err(|_| Error::Guest("a lane broke".into()))??;
        Ok(first && second)
    })
}

/// Runs one program, its guests on one processor; tells whether all its tests passed.
fn go(program: &Path, processor: usize, filter: Option<&str>, out: &Mutex<()>) -> Result<bool> {
    let name = name(program);
    let since = Instant::now();
    let mut command = Command::new(program);
    command.args(["--test-threads=1", "--show-output"]).args(filter);
    command.env(PROCESSOR, processor.to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
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
