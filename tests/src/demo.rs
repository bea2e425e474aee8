//! `cargo lab demo`, the part that runs in the lab host: a guest that owns a virtual function moves,
//! first as everybody moves it, then as uvmm does.
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::network::{Alias, Bulk, GUEST_DRIVER, GUEST_IP, Pinger};
use crate::vm::{Report, SHORT, Uvmm, Vm, text};

/// MiB that the guest keeps rewriting, and threads that do it: little, for an emulated host.
const LOAD: &str = "guest-load 8 1 /run/load > /dev/null & sleep 2";
/// How often the rest of the network pings the guest.
const OFTEN: Duration = Duration::from_millis(100);

/// Boots a Linux guest with a virtual function, makes it work, moves it there and back, and tells
/// about it on stdout.
///
/// # Errors
/// If the guest or a migration does anything but what a newcomer is told here.
pub fn run() -> Result<()> {
    let uvmm = Uvmm::new()?;
    // As the operators of two hosts do it: a guest keeps its address wherever it goes.
    let _alias = Alias::give("PF1", 0)?;
    let mut here = boot(&uvmm)?;

    say(
        "Moving it to another host. Everywhere the device has to go first: the guest is asked to let",
    );
    say_on("go of it, is copied without a network, and gets another one on the other side.");
    let (mut there, evicted) = travel(&uvmm, here, "there", "VF1", |vm| vm.joins_network())?;

    say(
        "Now with the guest driver. It tells uvmm what the card writes into memory, so that the card",
    );
    say_on("can work until the end, and then has the card's own driver pause and resume it:");
    command("rmmod igbvf; insmod uvmm_bridge.ko; insmod igbvf.ko   (in the guest)");
    there.joins_network_after(&format!("rmmod igbvf && {GUEST_DRIVER}"))?;
    let bulk = Bulk::start(&mut there)?;
    result("the network is back, and somebody sends the guest data all the time");
    let (vm, paused) = travel(&uvmm, there, "back", "VF0", Vm::pings)?;
    here = vm;
    let bytes = bulk.finish(&mut here)?;
    result(&format!("the transfer went on: {bytes} bytes arrived, checksum as sent"));
    let driver = here.says("dmesg | grep -oE '(paused|resumed) in [0-9]+ ms' | tail -2")?;
    result(&format!("the guest's driver says: {driver}"));

    say("What the rest of the network saw, pinging ten times a second:");
    let [evicted_ms, paused_ms] = [evicted, paused].map(|outage| outage.as_secs_f64() * 1e3);
    println!("  +----------------------------------+-----------+");
    println!("  | how the device moved             |    outage |");
    println!("  +----------------------------------+-----------+");
    println!("  | unplugged before, plugged after  | {evicted_ms:>6.0} ms |");
    println!("  | paused and resumed by its driver | {paused_ms:>6.0} ms |");
    println!("  +----------------------------------+-----------+");
    println!("  {:.0} times less", evicted_ms / paused_ms);

    say("And the workload that checked every page it wrote, through it all?");
    result(&load(&mut here)?.to_string());
    command("poweroff -f   (in the guest)");
    here.serial.send("poweroff -f")?;
    let status = here.wait(SHORT)?;
    if !status.success() {
        return Err(Error::Guest(format!("the guest powered off, but uvmm ended with {status}")));
    }
    result("uvmm ended with status 0");
    Ok(())
}

/// A guest with a network and something to do.
fn boot(uvmm: &Uvmm) -> Result<Vm> {
    say(
        "A stock Debian kernel gets a virtual function of this host's NIC, behind a bridge with slots:",
    );
    let device = format!("vfio,id=net0,host={}", text("VF0")?);
    command(&format!("uvmm run --kernel $GUEST_VMLINUX --initrd $GUEST_INITRD --device {device}"));
    let since = Instant::now();
    let mut vm = uvmm.guest("", &["--device", &device])?;
    let version = vm.says("uname -sr")?;
    result(&format!("{version} is up after {:.1} s", since.elapsed().as_secs_f32()));
    command("insmod igbvf.ko; ip link set eth0 up; ip address add …   (in the guest)");
    vm.joins_network_after("")?;
    result(&format!("{GUEST_IP} answers from {}", vm.says("cat /sys/class/net/eth0/address")?));
    say("In it, a thread rewrites 8 MiB and checks every page it wrote; another reads the clocks:");
    vm.says(LOAD)?;
    result(&load(&mut vm)?.to_string());
    Ok(vm)
}

/// Moves the guest to a new uvmm with the virtual function that `function` names; gives it and how
/// long it was not to be reached, once it is `reached` again.
fn travel(
    uvmm: &Uvmm,
    mut from: Vm,
    to: &str,
    function: &str,
    reached: impl FnOnce(&mut Vm) -> Result<()>,
) -> Result<(Vm, Duration)> {
    let device = format!("vfio,id=net0,host={}", text(function)?);
    let (mut there, address) = uvmm.incoming_with(to, &["--device", &device])?;
    command(&format!("uvmm run --incoming tcp:{address} --device {device}   (the other host)"));
    command(&format!("uvmm migrate --to {address} --dry-run"));
    let dry = ["migrate", "--vm", &from.name, "--to", &address, "--dry-run"];
    let (_, plan, errors) = uvmm.call(&dry)?;
    plan.lines().chain(errors.lines()).for_each(result);
    let pinger = Pinger::start(GUEST_IP, OFTEN)?;
    command(&format!("uvmm migrate --to {address}"));
    let report = uvmm.migrate(&from, &address)?;
    if report.status != "completed" {
        return Err(Error::Guest(format!("the migration did not complete: {report:?}")));
    }
    show(&report);
    from.wait(SHORT)?;
    reached(&mut there)?;
    Ok((there, pinger.finish()?.outage))
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
    let (seconds, mib) = (report.total_ms / 1000.0, report.bytes_sent >> 20);
    let (rounds, down) = (report.rounds, report.downtime_ms);
    result(&format!("completed in {seconds:.1} s: {mib} MiB in {rounds} rounds"));
    result(&format!("the guest stood still for {down:.0} ms"));
    for device in &report.devices {
        let (id, strategy, away) = (&device.id, &device.strategy, device.paused_ms);
        result(&format!("{id}: {strategy}, away for {away:.0} ms"));
    }
}

fn say(line: &str) {
    println!("\n{line}");
}

fn say_on(line: &str) {
    println!("{line}");
}

fn command(line: &str) {
    println!("  $ {line}");
}

fn result(line: &str) {
    println!("  > {line}");
}
