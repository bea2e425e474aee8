//! `cargo lab demo`, the part that runs in the lab host: a guest moves while it works.
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::vm::{Report, Uvmm, Vm, variable};

/// MiB that the guest keeps rewriting, and threads that do it: little, for an emulated host.
const LOAD: &str = "guest-load 8 1 /run/load &";

/// Boots a Linux guest, makes it work, moves it, and tells about it on stdout.
///
/// # Errors
/// If the guest or its migration does anything but what a newcomer is told here.
pub fn run() -> Result<()> {
    let uvmm = Uvmm::new()?;
    let kernel = variable("GUEST_KERNEL")?;
    say("One uvmm boots a stock Debian kernel, with 256 MiB:");
    command("uvmm run --name here --kernel $GUEST_KERNEL --initrd $GUEST_INITRD --memory 256M");
    let since = Instant::now();
    let mut here = uvmm.linux("here", Path::new(&kernel), &["--memory", "256M"])?;
    here.booted()?;
    let (version, _) = here.shell("uname -sr")?;
    result(&format!("{} is up after {:.1} s", version.trim(), since.elapsed().as_secs_f32()));

    say("In it, a thread rewrites 8 MiB and checks every page it wrote; another reads the clocks:");
    let (_, _) = here.shell(LOAD)?;
    let (_, _) = here.shell("sleep 3")?;
    result(&load(&mut here)?.to_string());

    say("A second uvmm waits for a guest, as it would on another host:");
    let (mut there, address) = uvmm.incoming("there")?;
    command(&format!("uvmm run --name there --incoming tcp:{address}"));

    say("The guest moves, while it works:");
    command(&format!("uvmm migrate --vm here --to {address}"));
    let report = uvmm.migrate(&here, &address)?;
    if report.status != "completed" {
        return Err(Error::Guest(format!("the migration did not complete: {report:?}")));
    }
    show(&report);
    here.wait(Duration::from_secs(60))?;
    result("the first uvmm has ended: the guest runs in the second one only");

    say("Nobody told the guest. What does its workload say now?");
    let (_, _) = there.shell("sleep 3")?;
    let after = load(&mut there)?;
    result(&after.to_string());
    result("every page as it was written, no clock went backwards");

    command("poweroff -f   (in the guest)");
    there.serial.send("poweroff -f")?;
    let status = there.wait(Duration::from_secs(60))?;
    if !status.success() {
        return Err(Error::Guest(format!("the guest powered off, but uvmm ended with {status}")));
    }
    result("the second uvmm ended with status 0");
    Ok(())
}

/// The workload's own account; an error if it found anything wrong or is gone.
fn load(vm: &mut Vm) -> Result<Load> {
    let (report, _) = vm.shell("pidof guest-load >/dev/null && cat /run/load")?;
    let value = |key: &str| {
        let word =
            report.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        word.and_then(|number| number.parse().ok())
    };
    match (value("pages"), value("longest_gap_us")) {
        (Some(pages), Some(gap_us)) => Ok(Load { pages, gap_us }),
        _ => Err(Error::Guest(format!(
            "the workload in the guest ended: {}",
            vm.serial.everything()
        ))),
    }
}

struct Load {
    pages: u64,
    gap_us: u64,
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gap = Duration::from_micros(self.gap_us);
        write!(f, "{} pages checked, longest pause between two clock reads {gap:.0?}", self.pages)
    }
}

fn show(report: &Report) {
    let mib = report.bytes_sent >> 20;
    result(&format!(
        "completed in {:.1} s: {mib} MiB in {} rounds",
        report.total_ms / 1000.0,
        report.rounds
    ));
    result(&format!(
        "at {:.0} MiB/s; the guest stood still for {:.0} ms",
        report.throughput_mib_s, report.downtime_ms
    ));
}

fn say(line: &str) {
    println!("\n{line}");
}

fn command(line: &str) {
    println!("  $ {line}");
}

fn result(line: &str) {
    println!("  > {line}");
}
