//! A running Linux guest moves between two uvmm processes and does not notice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm, variable};

const TRIPS: usize = 20;
const CPUS: &str = "2";
/// A guest that rewrites and checks memory and reads its clocks.
fn loaded_guest(uvmm: &Uvmm, name: &str) -> Vm {
    uvmm.working_guest(name, &["--memory", "128M", "--cpus", CPUS], 4, 2).unwrap()
}

/// What Linux says, once, when it found that it had not run for a while: so it was, and so it is in
/// a guest that is paused, or waits for its turn on the lab host's processor.
const DID_NOT_RUN: [&str; 2] =
    ["clocksource: Long readout interval, skipping watchdog check", "hrtimer: interrupt took"];

/// What the guest's kernel complained about, without the times.
fn complaints(vm: &mut Vm) -> BTreeSet<String> {
    let (log, _) = vm.shell("dmesg -r | grep '^<[0-4]>' | sed 's/^<.>\\[[^]]*\\] //'").unwrap();
    let expected = |line: &str| DID_NOT_RUN.iter().any(|start| line.starts_with(start));
    log.lines().filter(|line| !expected(line)).map(str::to_owned).collect()
}

#[test]
fn migrations_there_and_back_harm_nothing() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = loaded_guest(&uvmm, "host-0");
    vm.says("sleep 20").unwrap();
    let at_home = complaints(&mut vm);
    let mut checked = vm.pages_checked().unwrap();
    for trip in 1..=TRIPS {
        let (moved, report) = uvmm.move_on(vm, &format!("host-{trip}"), &[]).unwrap();
        vm = moved;
        checked = vm.works_on(checked).unwrap();
        println!("migration {trip}: {:.0} ms down, {} rounds", report.downtime_ms, report.rounds);
    }
    let new = complaints(&mut vm).difference(&at_home).cloned().collect::<Vec<_>>();
    assert!(new.is_empty(), "the guest's kernel complains about its travels: {new:#?}");
    vm.serial.send("poweroff -f").unwrap();
    assert_eq!(vm.wait(SHORT).unwrap().code(), Some(0));
}

#[test]
fn a_migration_that_is_only_tried_cancelled_or_cut_off_leaves_the_guest_running() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = loaded_guest(&uvmm, "source");
    let (mut incoming, address) = uvmm.incoming("incoming").unwrap();
    let mut checked = is_only_planned(&uvmm, &mut vm, &address);
    assert!(incoming.runs());
    // So slow that it cannot be over when something happens to it.
    let begin = |vm: &Vm, address: &str| {
        let child = uvmm.begin_to_migrate(vm, address, &["--bandwidth-limit", "4M"]).unwrap();
        uvmm.until_it_copies("source").unwrap();
        child
    };
    let child = begin(&vm, &address);
    assert!(uvmm.call(&["cancel", "--vm", "source"]).unwrap().0.success());
    assert_eq!(Report::of(child, SHORT).unwrap().status, "cancelled");
    checked = vm.works_on(checked).unwrap();
    drop(incoming);

    let (mut incoming, address) = uvmm.incoming("dies").unwrap();
    let child = begin(&vm, &address);
    incoming.kill();
    assert_eq!(Report::of(child, SHORT).unwrap().status, "failed");
    checked = vm.works_on(checked).unwrap();
    // And it is as fit to migrate as before.
    let (mut moved, _) = uvmm.move_on(vm, "second", &[]).unwrap();
    moved.works_on(checked).unwrap();
}

/// A dry run prints the plan and moves nothing; gives how much the guest's work has checked.
fn is_only_planned(uvmm: &Uvmm, vm: &mut Vm, address: &str) -> u64 {
    let dry_run = ["migrate", "--vm", "source", "--to", address, "--dry-run"];
    let (status, plan, errors) = uvmm.call(&dry_run).unwrap();
    assert!(status.success(), "{errors}");
    assert!(plan.to_lowercase().contains("stop 2 vcpus"), "{plan}");
    assert!(vm.runs());
    vm.works_on(0).unwrap()
}

/// Huge pages of the lab host, given back when dropped.
struct HugePages;

impl HugePages {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn reserve(count: u64) -> Self {
        fs::write(format!("{}/nr_hugepages", Self::DIR), count.to_string()).unwrap();
        let reserved = Self;
        assert_eq!(reserved.free(), count, "the lab host cannot spare so many");
        reserved
    }

    fn free(&self) -> u64 {
        let free = fs::read_to_string(format!("{}/free_hugepages", Self::DIR)).unwrap();
        free.trim().parse().unwrap()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _left_as_it_is = fs::write(format!("{}/nr_hugepages", Self::DIR), "0");
    }
}

#[test]
fn a_guest_whose_memory_is_huge_pages_moves_to_others() {
    inside_lab!();
    const ALL: u64 = 130;
    let huge_pages = HugePages::reserve(ALL);
    let uvmm = Uvmm::new().unwrap();
    let arguments = ["--memory", "128M", "--hugepages"];
    // This one came as a bzImage, as others do not here: it chose its place and its page tables.
    let kernel = PathBuf::from(variable("GUEST_KERNEL").unwrap());
    let mut vm = uvmm.linux("source", &kernel, &arguments).unwrap();
    vm.booted().unwrap();
    vm.works_with(4, 1).unwrap();
    // Linux does not touch all it has.
    let used = || ALL - huge_pages.free();
    assert!((20..=64).contains(&used()), "{}", used());
    let before = vm.pages_checked().unwrap();
    let (mut there, address) = uvmm.incoming_with("there", &["--hugepages"]).unwrap();
    let report = uvmm.migrate(&vm, &address).unwrap();
    assert_eq!(report.status, "completed", "{report:?}");
    assert!(vm.wait(SHORT).unwrap().success());
    there.works_on(before).unwrap();
    assert!((20..=64).contains(&used()), "{}", used());
}
