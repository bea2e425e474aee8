//! The test programs in two lab hosts, so that each has its network and its functions to itself.
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::{Part, name};
use crate::artefacts::Artefacts;
use crate::error::{Context, Error, Result};
use crate::host::{Lab, Nesting};
use crate::tier;

/// An emulated lab host keeps one processor of this machine busy, and a half.
const HOSTS: usize = 2;
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
    /// Runs `programs`, each in the lab host that is free first.
    ///
    /// # Errors
    /// If a lab host cannot be booted.
    pub(super) fn all(&self, mut programs: Vec<PathBuf>) -> Result<Vec<Part>> {
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

    fn host(&self, next: impl Fn() -> Option<PathBuf>) -> Result<Vec<Part>> {
        let mut lab = Lab::boot(self.artefacts)?;
        let mut parts = Vec::new();
        while let Some(program) = next() {
            parts.push(self.program(&mut lab, &program)?);
        }
        Ok(parts)
    }

    /// Runs a program, and again in another lab host if that ends or stands still.
    fn program(&self, lab: &mut Lab, program: &Path) -> Result<Part> {
        for _ in 0..tries(Nesting::here()) {
            match self.attempt(lab, program) {
                Ok(part) => return Ok(part),
                Err(error) => {
                    println!("lab: a lab host is of no use to {} any more: {error}", name(program));
                    *lab = Lab::boot(self.artefacts)?;
                }
            }
        }
        Ok(Part::inside(&name(program), false, Duration::ZERO, "no lab host saw its end"))
    }

    fn attempt(&self, lab: &mut Lab, program: &Path) -> Result<Part> {
        let mut command: Vec<OsString> = vec![self.lab_itself.clone().into()];
        command.push("test-inside".into());
        command.push(format!("--tries={}", tries(Nesting::here())).into());
        command.extend(self.filter.map(|filter| format!("--filter={filter}").into()));
        command.push(program.into());
        let (mut line, mut told) = (Vec::new(), None);
        let environment = [(tier::INSIDE, "1"), (tier::SEED, &*self.seed)];
        let status = lab.run(&command, &environment, |_, bytes| -> io::Result<()> {
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

/// How often a test in the lab host is tried before it is called failed.
fn tries(nesting: Nesting) -> u8 {
    match nesting {
        Nesting::Hardware => 1,
        Nesting::Emulation => 2,
    }
}
