//! How fast a Linux guest boots, and what uvmm itself takes for it, in the lab host.
use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::{Row, at_most, figure, median, resident_mib};
use crate::error::{Context, Error, Result};
use crate::vm::{BOOT, CMDLINE, Uvmm, variable};

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
    Ok(vec![
        figure("boot to the first line of /init, uvmm", ours, "s"),
        figure("boot to the first line of /init, QEMU microvm", theirs, "s"),
        at_most(0.42, "boot, uvmm / QEMU", ours / theirs, ""),
        at_most(6.0, "resident memory of uvmm beyond guest RAM", median(sizes), "MiB"),
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
