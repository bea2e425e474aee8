//! The test programs in two lab hosts, so that each has its network and its functions to itself.
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::attempt::LIMIT;
use super::{Part, name};
use crate::artefacts::Artefacts;
use crate::error::{Context, Error, Result};
use crate::host::{Lab, Nesting};
use crate::tier;

/// An emulated lab host keeps one processor of this machine busy, and a half.
const HOSTS: usize = 2;
/// A test that takes too long is ended inside, unless the lab host stands so still that its own
/// timers do.
const SILENCE: Duration = LIMIT.saturating_add(Duration::from_secs(60));
/// How often a test that failed is tried once more, before it is called failed.
const TRIES_ALONE: u8 = 2;
/// Programs that take long begin first, the longest first.
const LONG: [&str; 12] = [
    "mishaps",
    "pause",
    "migrate",
    "hotplug",
    "faults",
    "promise",
    "pci",
    "vfio",
    "ring",
    "evict",
    "boot",
    "guest_driver",
];

/// What runs, and how.
pub(super) struct Run<'a> {
    pub(super) artefacts: &'a Artefacts,
    /// This program, which runs a test program inside.
    pub(super) lab_itself: PathBuf,
    pub(super) filter: Option<&'a str>,
    /// What tests draw from, in whichever lab host they run.
    pub(super) seed: String,
}

impl Run<'_> {
    /// Runs `programs`, and once more what of them failed where another lab host was beside it.
    ///
    /// # Errors
    /// If a lab host cannot be booted.
    pub(super) fn all(&self, programs: Vec<PathBuf>) -> Result<Vec<Part>> {
        let parts = self.side_by_side(programs)?.into_iter();
        let once_more = |(program, part): (PathBuf, Part)| {
            let is_slow = Nesting::here() == Nesting::Emulation;
            if part.passed() || !is_slow { Ok(part) } else { self.alone(&program, part) }
        };
        parts.map(once_more).collect()
    }

    /// Each in the lab host that is free first.
    fn side_by_side(&self, mut programs: Vec<PathBuf>) -> Result<Vec<(PathBuf, Part)>> {
        let rank = |program: &PathBuf| {
            let name = name(program);
            LONG.iter().position(|long| *long == name).unwrap_or(LONG.len())
        };
        programs.sort_by_key(rank);
        let programs = &Mutex::new(programs.into_iter());
        let next = || programs.lock().ok().and_then(|mut programs| programs.next());
        let next = &next;
        thread::scope(|scope| {
            let start = |number| {
                let host = thread::Builder::new().name(format!("lab-{number}"));
                let host = host.spawn_scoped(scope, move || self.host(next));
                host.context(|| "cannot start a thread".into())
            };
            let hosts = (0..HOSTS).map(start).collect::<Result<Vec<_>>>()?;
            let mut parts = Vec::new();
            for host in hosts {
                parts.extend(host.join().map_err(|_| Error::Host("a lab host broke".into()))??);
            }
            Ok(parts)
        })
    }

    fn host(&self, next: impl Fn() -> Option<PathBuf>) -> Result<Vec<(PathBuf, Part)>> {
        let mut lab = Lab::boot(self.artefacts)?;
        let mut parts = Vec::new();
        while let Some(program) = next() {
            let part = match self.run(&mut lab, &program, self.filter) {
                Ok(part) => part,
                Err(error) => {
                    println!(
                        "lab: a lab host is of no use to {} any more: {error}",
                        name(&program)
                    );
                    lab = Lab::boot(self.artefacts)?;
                    Part::inside(&name(&program), false, Duration::ZERO, "its end was not seen")
                }
            };
            parts.push((program, part));
        }
        Ok(parts)
    }

    /// Tries once more what `part` says of `program` that it failed. An emulated lab host is slow,
    /// and slower at times: beside another one, or where this machine has others to serve.
    fn alone(&self, program: &Path, part: Part) -> Result<Part> {
        let mut tests: Vec<_> = part.failed().map(Some).collect();
        if tests.is_empty() {
            tests.push(self.filter); // it came to no end, and nobody told what failed
        }
        for test in tests {
            if !self.passes_alone(program, test)? {
                return Ok(part);
            }
        }
        Ok(part.flaky())
    }

    fn passes_alone(&self, program: &Path, test: Option<&str>) -> Result<bool> {
        for _ in 0..TRIES_ALONE {
            let (name, what) = (name(program), test.unwrap_or("all of it"));
            println!("{name:<12} {what}: once more, alone");
            let mut lab = Lab::boot(self.artefacts)?;
            match self.run(&mut lab, program, test) {
                Ok(part) if part.passed() => return Ok(true),
                Ok(part) => println!("{part}"),
                Err(error) => println!("lab: a lab host was of no use to {name}: {error}"),
            }
        }
        Ok(false)
    }

    fn run(&self, lab: &mut Lab, program: &Path, filter: Option<&str>) -> Result<Part> {
        let mut command: Vec<OsString> = vec![self.lab_itself.clone().into()];
        command.push("test-inside".into());
        command.extend(filter.map(|filter| format!("--filter={filter}").into()));
        command.push(program.into());
        let (mut line, mut told) = (Vec::new(), None);
        let environment = [(tier::INSIDE, "1"), (tier::SEED, &*self.seed)];
        let status = lab.run(&command, &environment, SILENCE, |_, bytes| -> io::Result<()> {
            for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
                line.extend_from_slice(piece);
                if piece.ends_with(b"\n") {
                    io::stdout().write_all(&line)?;
                    told = Part::told(String::from_utf8_lossy(&line).trim_end()).or(told.take());
                    line.clear();
                }
            }
            Ok(())
        })?;
        let agrees = |part: &Part| part.passed() == (status == 0);
        told.filter(agrees).ok_or_else(|| Error::Timeout("it came to no end there".into()))
    }
}
