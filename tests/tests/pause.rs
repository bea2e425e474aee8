//! A Linux guest with the guest driver moves, and its virtual functions work until the end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs;
use std::path::Path;
use std::time::Duration;

use tests::inside_lab;
use tests::network::{Alias, Bulk, GUEST_DRIVER, GUEST_IP, Pinger};
use tests::vm::{Report, SHORT, Uvmm, Vm, text};

/// Migrations in a row.
const TRIPS: usize = 10;
/// How often the rest of the network pings.
const OFTEN: Duration = Duration::from_millis(100);

/// `--device` for the lab's virtual function that `variable` names.
fn device(id: &str, variable: &str) -> String {
    format!("vfio,id={id},host={}", text(variable).unwrap())
}

/// Boots a guest with `VF0`, and joins the network.
fn networked(uvmm: &Uvmm, more: &str, driver: &str, arguments: &[&str]) -> Vm {
    let mut vm = uvmm.guest(more, arguments).unwrap();
    vm.joins_network_after(driver).unwrap();
    vm
}

/// Moves a stock guest; gives it and how long the rest of the network cannot reach it.
fn outage_of_eviction(uvmm: &Uvmm, vm: Vm) -> (Vm, Duration) {
    let pinger = Pinger::start(GUEST_IP, OFTEN).unwrap();
    let (mut vm, report) = uvmm.move_on(vm, "evicted", &[&device("net0", "VF1")]).unwrap();
    assert_eq!(report.ways(), ["net0=evict"]);
    vm.joins_network().unwrap();
    (vm, pinger.finish().unwrap().outage)
}

#[test]
fn a_paused_function_keeps_its_connections_from_trip_to_trip() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let mut vm = networked(&uvmm, "", "", &["--device", &device("net0", "VF0")]);
    vm.works_with(4, 1).unwrap();
    let (mut vm, evicted) = outage_of_eviction(&uvmm, vm);
    vm.joins_network_after(&format!("rmmod igbvf && {GUEST_DRIVER}")).unwrap();
    let bulk = Bulk::start(&mut vm).unwrap();
    println!("| trip | outage | paused | stopped |");
    println!("| evicted | {evicted:.0?} | | |");
    let mut outages = Vec::new();
    for (trip, function) in (1..=TRIPS).zip(["VF0", "VF1"].into_iter().cycle()) {
        let pinger = Pinger::start(GUEST_IP, OFTEN).unwrap();
        let name = format!("host-{trip}");
        let (moved, report) = uvmm.move_on(vm, &name, &[&device("net0", function)]).unwrap();
        vm = moved;
        assert_eq!(report.ways(), ["net0=pause"]);
        vm.pings().unwrap();
        let outage = pinger.finish().unwrap().outage;
        let (paused, stopped) = (report.devices[0].paused_ms, report.downtime_ms);
        println!("| {trip} | {outage:.0?} | {paused} ms | {stopped} ms |");
        outages.push(outage);
    }
    outages.sort();
    // A late wake-up of an emulated processor that others share says nothing.
    let outage = outages[TRIPS / 4];
    assert!(outage * 10 <= evicted, "{outage:?} is much beside {evicted:?}");
    assert!(bulk.finish(&mut vm).unwrap() > 0);
    vm.works_on(0).unwrap();
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn a_guest_that_bounces_all_dma_is_evicted_late_or_pauses() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let arguments = ["--cpus", "2", "--device", &device("net0", "VF0")];
    let vm = networked(&uvmm, "swiotlb=force", "", &arguments);
    let (planned, address) =
        uvmm.incoming_with("planned", &["--device", &device("net0", "VF1")]).unwrap();
    let plan = dry_run(&uvmm, &address);
    assert!(plan.contains("release  unplug net0") && !plan.contains("precopy"), "{plan}");
    assert!(plan.contains("net0: evict: the guest bounces all DMA"), "{plan}");
    drop(planned);
    let (mut vm, report) = uvmm.move_on(vm, "there", &[&device("net0", "VF1")]).unwrap();
    assert_eq!(report.ways(), ["net0=evict"]);
    vm.joins_network().unwrap();

    vm.joins_network_after(&format!("rmmod igbvf && {GUEST_DRIVER}")).unwrap();
    let bulk = Bulk::start(&mut vm).unwrap();
    let (vm, report) = uvmm.move_on(vm, "back", &[&device("net0", "VF0")]).unwrap();
    assert_eq!(report.ways(), ["net0=pause"]);
    let (mut vm, report) = uvmm.move_on(vm, "again", &[&device("net0", "VF1")]).unwrap();
    assert_eq!(report.ways(), ["net0=pause"]);
    vm.pings().unwrap();
    assert!(bulk.finish(&mut vm).unwrap() > 0);
}

#[test]
fn one_function_is_paused_and_another_evicted() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let other = format!("{},slot=3,strategy=evict", device("net1", "VF2"));
    let arguments = ["--device", &device("net0", "VF0"), "--device", &other];
    let vm = networked(&uvmm, "", GUEST_DRIVER, &arguments);
    let devices = [device("net0", "VF1"), device("net1", "VF3")];
    let (mut vm, report) = uvmm.move_on(vm, "there", &[&devices[0], &devices[1]]).unwrap();
    assert_eq!(report.ways(), ["net0=pause", "net1=evict"]);
    vm.pings().unwrap();
    vm.until("[ -d /sys/bus/pci/devices/0000:01:03.0/net ]").unwrap();
    assert_eq!(vm.errors().unwrap(), "");
}

/// What `migrate --dry-run` of the guest prints.
fn dry_run(uvmm: &Uvmm, address: &str) -> String {
    let arguments = ["migrate", "--vm", "guest", "--to", address, "--dry-run"];
    let (status, plan, errors) = uvmm.call(&arguments).unwrap();
    assert!(status.success(), "{errors}");
    plan
}

/// A function of the lab host that VFIO has as well, and that is no NIC: given back when dropped.
struct Stranger(String);

impl Stranger {
    fn new() -> Self {
        let functions = fs::read_dir("/sys/bus/pci/devices").unwrap();
        let names = functions.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let is_rng = |name: &String| {
            let id = fs::read_to_string(format!("/sys/bus/pci/devices/{name}/device")).unwrap();
            ["0x1005", "0x1044"].contains(&id.trim())
        };
        let stranger = Self(names.into_iter().find(is_rng).unwrap());
        stranger.bind("vfio-pci");
        stranger
    }

    fn bind(&self, driver: &str) {
        let function = Path::new("/sys/bus/pci/devices").join(&self.0);
        let _unbound = fs::write(function.join("driver/unbind"), &self.0);
        fs::write(function.join("driver_override"), driver).unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &self.0).unwrap();
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.bind("\n");
    }
}

/// Makes the guest promise everything, and do nothing: bits 0 to 2 of the block's control register.
const LIE: &str =
    "printf '\\007' | dd of=/sys/bus/pci/devices/0000:00:01.0/config bs=1 seek=108 conv=notrunc";

#[test]
fn a_guest_that_cannot_go_breaks_its_promise_or_never_answers_keeps_its_function() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let refuse = format!("{},on-timeout=refuse", device("net0", "VF0"));
    let mut vm = networked(&uvmm, "", GUEST_DRIVER, &["--device", &refuse]);
    let bulk = Bulk::start(&mut vm).unwrap();
    let there = device("net0", "VF1");

    let stranger = Stranger::new();
    let wrong = format!("vfio,id=net0,host={}", stranger.0);
    let (_refuses, address) = uvmm.incoming_with("refuses", &["--device", &wrong]).unwrap();
    let report = uvmm.migrate(&vm, &address).unwrap();
    let error = report.error.unwrap();
    for part in ["device/net0/model: wanted \"8086:10ca", "device/net0/bars", "net0/interrupts"] {
        assert!(report.status == "failed" && error.contains(part), "{error}");
    }
    vm.pings().unwrap();

    // The guest takes its word back.
    let (incoming, address) = uvmm.incoming_with("betrayed", &["--device", &there]).unwrap();
    let plan = dry_run(&uvmm, &address);
    assert!(plan.contains("release  have the guest pause net0"), "{plan}");
    let child = uvmm.begin_to_migrate(&vm, &address, &["--bandwidth-limit", "16M"]).unwrap();
    uvmm.until_it_copies("guest").unwrap();
    vm.says("rmmod uvmm_bridge").unwrap();
    let report = Report::of(child, SHORT).unwrap();
    let error = report.error.unwrap();
    assert!(report.status == "failed" && error.contains("no longer tells"), "{error}");
    vm.pings().unwrap();
    drop(incoming);

    // It gives it again, and nothing is behind it.
    vm.says(LIE).unwrap();
    let (_incoming, address) = uvmm.incoming_with("waits", &["--device", &there]).unwrap();
    let report = uvmm.migrate(&vm, &address).unwrap();
    let error = report.error.unwrap();
    assert!(error.contains("does not pause net0, and on-timeout=refuse"), "{error}");
    vm.pings().unwrap();

    assert!(bulk.finish(&mut vm).unwrap() > 0, "all the while");
    assert_eq!(vm.says("cat /sys/bus/pci/slots/1/power").unwrap(), "1");
}

#[test]
fn a_guest_that_never_answers_is_asked_to_let_go() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = networked(&uvmm, "", "", &["--device", &device("net0", "VF0")]);
    vm.says(LIE).unwrap();
    let (mut vm, report) = uvmm.move_on(vm, "evicted", &[&device("net0", "VF1")]).unwrap();
    assert_eq!(report.ways(), ["net0=evict"]);
    vm.joins_network().unwrap();
}
