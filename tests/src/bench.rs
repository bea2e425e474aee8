//! `cargo lab bench`: what the README claims, measured against others in one run.
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{Context, Error, Result, reading};
use crate::vm::{BOOT, CMDLINE, Uvmm, variable};

/// Runs of each VMM; the median counts.
pub const RUNS: usize = 5;

/// One figure and what it should be.
#[derive(Debug, Serialize)]
pub struct Row {
    figure: &'static str,
    /// The most that is good enough, if there is a goal.
    goal: Option<f64>,
    measured: f64,
    unit: &'static str,
}

impl Row {
    /// Whether the goal is reached, or there is none.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.goal.is_none_or(|goal| self.measured <= goal)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<58} {:>8.2} {:<4}", self.figure, self.measured, self.unit)?;
        match self.goal {
            Some(goal) => {
                write!(f, " goal {goal:>5.2}  {}", if self.ok() { "ok" } else { "MISSED" })
            }
            None => Ok(()),
        }
    }
}

/// Measures what is measured in the lab host; `runs` boots of each VMM, in turns.
///
/// # Errors
/// If a VMM does not boot the guest.
pub fn boots(runs: usize) -> Result<Vec<Row>> {
    let mut uvmm_times = Vec::new();
    let mut qemu_times = Vec::new();
    let mut sizes = Vec::new();
    let uvmm = Uvmm::new()?;
    for run in 1..=runs {
        let ours = boot(&mut with_uvmm(&uvmm)?)?;
        let theirs = boot(&mut with_qemu()?)?;
        eprintln!("boot {run} of {runs}: uvmm {:.2} s, QEMU {:.2} s", ours.seconds, theirs.seconds);
        uvmm_times.push(ours.seconds);
        qemu_times.push(theirs.seconds);
        sizes.push(ours.resident_mib);
    }
    let (ours, theirs) = (median(uvmm_times), median(qemu_times));
    let row = |figure, goal, measured, unit| Row { figure, goal, measured, unit };
    Ok(vec![
        row("boot to the first line of /init, uvmm", None, ours, "s"),
        row("boot to the first line of /init, QEMU microvm", None, theirs, "s"),
        row("boot, uvmm / QEMU", Some(0.42), ours / theirs, ""),
        row("resident memory of uvmm beyond guest RAM", Some(6.0), median(sizes), "MiB"),
    ])
}

/// The same guest for every VMM: one vCPU, 256 MiB, the kernel as an ELF file.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Guest {
    fn new() -> Result<Self> {
        Ok(Self {
            kernel: variable("GUEST_VMLINUX")?.into(),
            initrd: variable("GUEST_INITRD")?.into(),
        })
    }
}

fn with_uvmm(uvmm: &Uvmm) -> Result<Command> {
    let guest = Guest::new()?;
    let mut command = uvmm.command(["run", "--memory", "256M", "--cpus", "1", "--serial", "stdio"]);
    command
        .args(["--cmdline", CMDLINE])
        .arg("--kernel")
        .arg(guest.kernel)
        .arg("--initrd")
        .arg(guest.initrd);
    Ok(command)
}

fn with_qemu() -> Result<Command> {
    let guest = Guest::new()?;
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm", "-enable-kvm", "-cpu", "host", "-m", "256M", "-smp", "1"]);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command
        .args(["-append", CMDLINE])
        .arg("-kernel")
        .arg(guest.kernel)
        .arg("-initrd")
        .arg(guest.initrd);
    Ok(command)
}

struct Boot {
    seconds: f64,
    resident_mib: f64,
}

/// Starts a VMM with the guest's console on stdout and waits for the first line of `/init`.
fn boot(command: &mut Command) -> Result<Boot> {
    let name = command.get_program().to_owned();
    let since = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut child = child.context(|| format!("cannot run {}", name.display()))?;
    let output = child.stdout.take().expect("stdout is piped");
    let booted = first_line(output, since, &name);
    let resident = resident_mib(child.id());
    drop((child.kill(), child.wait()));
    Ok(Boot { seconds: booted?.as_secs_f64(), resident_mib: resident? })
}

fn first_line(
    output: impl Read + Send + 'static,
    since: Instant,
    name: &OsString,
) -> Result<Duration> {
    let (found, wait) = mpsc::channel();
    let read = move || {
        let (mut output, mut bytes, mut chunk) = (output, Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = output.read(&mut chunk) {
            bytes.extend_from_slice(&chunk[..count]);
            if String::from_utf8_lossy(&bytes).contains("uvmm-guest: init") {
                // Nobody waits any more when it came too late.
                let _ = found.send(since.elapsed());
                return;
            }
        }
    };
    let reader = std::thread::Builder::new().name("console".into()).spawn(read);
    reader.context(|| "cannot start a thread".into())?;
    wait.recv_timeout(BOOT).map_err(|why| {
        let name = name.display();
        match why {
            RecvTimeoutError::Timeout => {
                Error::Timeout(format!("{name} did not boot the guest in {BOOT:.0?}"))
            }
            RecvTimeoutError::Disconnected => {
                Error::Guest(format!("{name} ended before the guest had booted"))
            }
        }
    })
}

/// The resident memory that is no shared memory; guest RAM is a memfd, and so shared.
fn resident_mib(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let status = fs::read_to_string(&path).context(|| reading(&path))?;
    let kib = |key: &str| -> Option<f64> {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key))?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    };
    match (kib("RssAnon:"), kib("RssFile:")) {
        (Some(anonymous), Some(file)) => Ok((anonymous + file) / 1024.0),
        _ => Err(Error::Unsupported(format!("{} tells no resident size", path.display()))),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn a_goal_is_the_most_that_is_good_enough() {
        let row = |measured| Row { figure: "", goal: Some(6.0), measured, unit: "MiB" };
        assert!(row(6.0).ok());
        assert!(!row(6.01).ok());
        assert!(!row(f64::NAN).ok());
    }
}
