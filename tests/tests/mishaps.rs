//! Whatever goes wrong while a guest moves, at whichever step: it runs once, with a function that
//! works.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::inside_lab;
use tests::network::{Alias, GUEST_DRIVER, Relay};
use tests::vm::{Report, SHORT, Uvmm, Vm, text};

/// `--device` for the function that `variable` names.
fn device(variable: &str) -> String {
    format!("vfio,id=net0,host={}", text(variable).unwrap())
}

/// Boots a guest with `VF0`, and joins the network.
fn networked(uvmm: &Uvmm, driver: &str) -> Vm {
    let mut vm = uvmm.guest("", &["--device", &device("VF0")]).unwrap();
    vm.joins_network_after(driver).unwrap();
    vm
}

/// A migration under way, and the lines that it prints about what it does.
struct Journey {
    child: Child,
    lines: Receiver<String>,
}

impl Journey {
    fn begin(uvmm: &Uvmm, vm: &Vm, address: &str) -> Self {
        let mut child = uvmm.begin_to_migrate(vm, address, &["--streams", "1"]).unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        let tell = move || {
            for line in errors.lines().map_while(Result::ok) {
                let _ended = sender.send(line);
            }
        };
        Builder::new().name("lines".into()).spawn(tell).unwrap();
        Self { child, lines }
    }

    /// Waits until it says that it does this.
    fn until(&self, step: &str) {
        let deadline = Instant::now() + SHORT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|error| panic!("it never came to {step}: {error}"));
            if line.contains(step) {
                return;
            }
        }
    }

    fn end(self) -> Report {
        Report::of(self.child, SHORT).unwrap()
    }
}

/// The destination's function, which its host takes away; and given back in the end.
struct Taken {
    address: String,
    taking: JoinHandle<()>,
}

impl Taken {
    /// Begins to take what `variable` names: the host waits for whoever has it.
    fn begin(variable: &str) -> Self {
        let address = text(variable).unwrap();
        let wanted = address.clone();
        let take = move || fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", wanted).unwrap();
        let taking = Builder::new().name("host".into()).spawn(take).unwrap();
        Self { address, taking }
    }

    /// Waits until the host has it, and lets uvmm have it again.
    fn give_back(self) {
        let deadline = Instant::now() + SHORT;
        while !self.taking.is_finished() {
            assert!(Instant::now() < deadline, "the host still waits for {}", self.address);
            thread::sleep(Duration::from_millis(20));
        }
        self.taking.join().unwrap();
        let function = Path::new("/sys/bus/pci/devices").join(&self.address);
        fs::write(function.join("driver_override"), "vfio-pci").unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &self.address).unwrap();
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The destination's process is killed.
    Killed,
    /// The connection is cut.
    Cut,
    /// Someone says `uvmm cancel`.
    Cancelled,
    /// The host of the destination takes the function away.
    Taken,
    /// The guest unloads the guest driver.
    Unloaded,
}

/// What goes wrong whatever the guest has.
const FAULTS: [Fault; 4] = [Fault::Killed, Fault::Cut, Fault::Cancelled, Fault::Taken];

/// When nothing is passed on to the destination any more, so that a step stays the last one.
#[derive(Debug, Clone, Copy)]
enum Held {
    /// From when this is done.
    From(&'static str),
    /// From the first answer after this is done.
    FromAnswerAfter(&'static str),
}

const DIRTY: &str = "have the guest write whatever its devices write";
const COPY: &str = "copying";
const PAUSE: &str = "have the guest pause net0";
const STAY: &str = "see that what is paused stays so";
const GIVE: &str = "handing over";
const UNPLUG: &str = "unplug net0";

/// Migrates the guest, and has `fault` come when it is at `step`; gives the report and what became
/// of the destination.
fn go_wrong(uvmm: &Uvmm, vm: &mut Vm, held: Held, step: &str, fault: Fault) -> (Report, Vm) {
    let name = format!("{fault:?}-{}", step.replace(' ', "-"));
    let (mut there, address) = uvmm.incoming_with(&name, &["--device", &device("VF1")]).unwrap();
    let relay = Relay::to(&address).unwrap();
    let journey = Journey::begin(uvmm, vm, &relay.address());
    let first = match held {
        Held::From(step) | Held::FromAnswerAfter(step) => step,
    };
    journey.until(first);
    match held {
        Held::From(_) => relay.hold(),
        Held::FromAnswerAfter(_) => relay.hold_at_answer(),
    }
    if step != first {
        journey.until(step);
    }
    match fault {
        Fault::Killed => there.kill(),
        Fault::Cut => relay.cut(),
        Fault::Cancelled => cancel(uvmm),
        Fault::Taken => Taken::begin("VF1").give_back(),
        Fault::Unloaded => assert_eq!(vm.says("rmmod uvmm_bridge").unwrap(), ""),
    }
    relay.release();
    if (step, fault) == (GIVE, Fault::Killed) {
        cancel(uvmm); // nobody is there to be asked
    }
    (journey.end(), there)
}

fn cancel(uvmm: &Uvmm) {
    let (status, _, errors) = uvmm.call(&["cancel", "--vm", "guest"]).unwrap();
    assert!(status.success(), "{errors}");
}

/// Where the guest finds the bridge's migration block, from byte 104.
const BLOCK: &str = "/sys/bus/pci/devices/0000:00:01.0/config";

/// The guest runs here with its function, and nothing is left of what was begun.
fn is_as_before(uvmm: &Uvmm, vm: &mut Vm) {
    vm.pings().unwrap();
    let info = uvmm.info("guest").unwrap();
    let slot = &info["slots"][0];
    let stands = [&info["state"], &slot["device"], &slot["state"], &slot["power_led"]];
    assert_eq!(stands, ["running", "net0", "enabled", "on"], "{info}");
    // What was wanted of the guest (but for the bit that says that it changed), what it was asked
    // to pause, what it paused.
    let said = vm.says(&format!("od -An -tx4 -j104 -N16 {BLOCK}")).unwrap();
    let words: Vec<_> =
        said.split_whitespace().map(|word| u32::from_str_radix(word, 16).unwrap()).collect();
    let [status, _, asked, paused] = words[..] else { panic!("{said}") };
    assert_eq!((status & 3, asked, paused), (0, 0, 0), "{said}");
    let driver = format!("/sys/bus/pci/devices/{}/driver", text("VF1").unwrap());
    assert!(fs::read_link(driver).unwrap().ends_with("vfio-pci"));
}

#[test]
fn at_whichever_step_of_a_pause_something_goes_wrong_the_guest_has_its_function_again() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let mut vm = networked(&uvmm, GUEST_DRIVER);
    for (held, step) in [
        (Held::From(DIRTY), DIRTY),
        (Held::From(COPY), COPY),
        (Held::From(PAUSE), PAUSE),
        (Held::From(PAUSE), STAY),
        (Held::FromAnswerAfter(PAUSE), GIVE),
    ] {
        for fault in FAULTS.into_iter().chain([Fault::Unloaded]) {
            let since = Instant::now();
            if (step, fault) == (GIVE, Fault::Cancelled) {
                continue; // it is too late, see below
            }
            if matches!((step, fault), (DIRTY, Fault::Taken) | (STAY, Fault::Taken | Fault::Cut)) {
                continue; // as while memory is copied, and while it pauses
            }
            if fault == Fault::Unloaded && ![DIRTY, COPY].contains(&step) {
                continue; // it pauses or stands still, see the next test
            }
            let (report, _there) = go_wrong(&uvmm, &mut vm, held, step, fault);
            let error = report.error.unwrap_or_default();
            let expected = match (step, fault) {
                (GIVE, Fault::Killed) => "undecided",
                (_, Fault::Cancelled) => "cancelled",
                _ => "failed",
            };
            assert_eq!(report.status, expected, "{step}, {fault:?}: {error}");
            if expected == "undecided" {
                let resolve = ["resolve", "--vm", "guest", "--run-here", "--yes"];
                assert!(uvmm.call(&resolve).unwrap().0.success());
                uvmm.until("guest", |info| info["state"] == "running").unwrap();
            }
            if fault == Fault::Taken && step != GIVE {
                assert!(error.contains("its host wants the device net0"), "{step}: {error}");
            }
            is_as_before(&uvmm, &mut vm);
            if fault == Fault::Unloaded {
                assert!(error.contains("no longer tells"), "{step}: {error}");
                vm.joins_network_after(&format!("rmmod igbvf && {GUEST_DRIVER}")).unwrap();
            }
            println!("{step}, {fault:?}: {expected} ({error}) {:.1?}", since.elapsed());
        }
    }
    // Once it is given away it goes, whatever anybody wishes.
    let held = Held::FromAnswerAfter(PAUSE);
    let (report, mut there) = go_wrong(&uvmm, &mut vm, held, GIVE, Fault::Cancelled);
    assert_eq!(report.status, "completed", "{report:?}");
    assert!(vm.wait(SHORT).unwrap().success());
    there.pings().unwrap();
}

#[test]
fn whatever_goes_wrong_while_a_function_is_unplugged_or_wanted_back_the_guest_has_it_again() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = networked(&uvmm, "");
    for fault in FAULTS {
        let since = Instant::now();
        let (report, _there) = go_wrong(&uvmm, &mut vm, Held::From(UNPLUG), UNPLUG, fault);
        let error = report.error.unwrap_or_default();
        let expected = if fault == Fault::Cancelled { "cancelled" } else { "failed" };
        assert_eq!(report.status, expected, "{fault:?}: {error}");
        is_as_before(&uvmm, &mut vm);
        println!("{fault:?}: {expected} ({error}) {:.1?}", since.elapsed());
    }
    // It is out.
    for fault in FAULTS {
        let (report, _there) = go_wrong(&uvmm, &mut vm, Held::From(COPY), COPY, fault);
        assert_ne!(report.status, "completed", "{fault:?}");
        vm.joins_network().unwrap();
        is_as_before(&uvmm, &mut vm);
    }
    a_function_that_the_host_wants_back_is_asked_of_the_guest(&uvmm, &mut vm);
}

#[test]
fn a_guest_driver_that_is_unloaded_while_it_pauses_takes_nothing_with_it() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    // One processor pauses, the other unloads.
    let mut vm = uvmm.guest("", &["--cpus", "2", "--device", &device("VF0")]).unwrap();
    vm.joins_network_after(GUEST_DRIVER).unwrap();
    let asked = format!("od -An -tx4 -j112 -N4 {BLOCK} | grep -q [1-9]");
    let unload = "rmmod uvmm_bridge; echo $? > /run/unloaded";
    vm.says(&format!("(until {asked}; do :; done; {unload}) > /dev/null 2>&1 &")).unwrap();
    let (mut there, address) = uvmm.incoming_with("there", &["--device", &device("VF1")]).unwrap();
    let report = uvmm.migrate(&vm, &address).unwrap();
    println!("{}: {:?} {:?}", report.status, report.devices, report.error);
    let runs = match &*report.status {
        "completed" => {
            assert!(vm.wait(SHORT).unwrap().success());
            &mut there
        }
        _ => &mut vm,
    };
    if report.status == "completed" && report.devices[0].strategy == "evict" {
        runs.joins_network().unwrap();
    }
    runs.pings().unwrap();
    runs.until("[ -e /run/unloaded ]").unwrap();
    assert_eq!(runs.says("cat /run/unloaded").unwrap(), "0");
    assert_eq!(runs.says("grep uvmm_bridge /proc/modules | wc -l").unwrap(), "0");
}

fn a_function_that_the_host_wants_back_is_asked_of_the_guest(uvmm: &Uvmm, vm: &mut Vm) {
    Taken::begin("VF0").give_back();
    assert_eq!(uvmm.info("guest").unwrap()["slots"][0]["device"], Value::Null);
    vm.until("! [ -e /sys/class/net/eth0 ]").unwrap();
    let (status, _, errors) =
        uvmm.call(&["plug", "--vm", "guest", "--device", &device("VF0")]).unwrap();
    assert!(status.success(), "{errors}");
    vm.joins_network().unwrap();
}

/// What else a destination must be told so that a guest can boot again there.
fn booting() -> [String; 6] {
    let [kernel, initrd] = ["GUEST_VMLINUX", "GUEST_INITRD"].map(|name| text(name).unwrap());
    let cmdline = tests::vm::CMDLINE.to_owned();
    ["--kernel".into(), kernel, "--initrd".into(), initrd, "--cmdline".into(), cmdline]
}

/// Waits until a guest that restarted takes commands, and gives it the driver of its card.
fn boots_again(vm: &mut Vm) {
    vm.booted().unwrap();
    vm.joins_network_after("").unwrap();
}

#[test]
fn a_guest_that_restarts_on_its_way_has_its_function_again() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = networked(&uvmm, GUEST_DRIVER);
    // It restarts while memory is copied.
    let (first, address) = uvmm.incoming_with("first", &["--device", &device("VF1")]).unwrap();
    let relay = Relay::to(&address).unwrap();
    let journey = Journey::begin(&uvmm, &vm, &relay.address());
    journey.until(COPY);
    relay.hold();
    vm.serial.send("reboot -f").unwrap();
    let report = journey.end();
    assert_eq!(report.status, "cancelled", "{report:?}");
    drop((relay, first));
    boots_again(&mut vm);
    // It restarts before it has the function that it was evicted from.
    let mut arguments = vec!["--device".to_owned(), device("VF1")];
    arguments.extend(booting());
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let (mut there, address) = uvmm.incoming_with("second", &arguments).unwrap();
    let journey = Journey::begin(&uvmm, &vm, &address);
    journey.until(GIVE);
    there.serial.send("").unwrap();
    there.serial.expect("status 0", SHORT).unwrap();
    let info = uvmm.info("second").unwrap();
    assert_ne!(info["slots"][0]["state"], "enabled", "it has it already: {info}");
    there.serial.send("reboot -f").unwrap();
    assert_eq!(journey.end().status, "completed");
    boots_again(&mut there);
}
