//! A running Linux guest moves between two uvmm processes and does not notice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::collections::BTreeSet;
use std::process::Stdio;

use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm};

const TRIPS: usize = 20;
const CPUS: &str = "2";
/// A guest that rewrites and checks memory and reads its clocks.
fn loaded_guest(uvmm: &Uvmm, name: &str) -> Vm {
    uvmm.working_guest(name, &["--memory", "128M", "--cpus", CPUS], 24, 2).unwrap()
}

/// How much the workload has checked so far.
fn pages_checked(vm: &mut Vm) -> u64 {
    vm.pages_checked().unwrap()
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

/// Moves the guest to a new VM; the old process must have ended well.
fn move_on(uvmm: &Uvmm, mut from: Vm, to: &str) -> (Vm, Report) {
    let (vm, address) = uvmm.incoming(to).unwrap();
    let report = uvmm.migrate(&from, &address).unwrap();
    let status = from.wait(SHORT).unwrap();
    let errors = from.errors().unwrap();
    assert_eq!(report.status, "completed", "{report:?} {errors}");
    assert_eq!(status.code(), Some(0), "{errors}");
    (vm, report)
}

#[test]
fn migrations_there_and_back_harm_nothing() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut still = loaded_guest(&uvmm, "still");
    let (_, _) = still.shell("sleep 20").unwrap();
    let at_home = complaints(&mut still);
    drop(still);
    let mut vm = loaded_guest(&uvmm, "host-0");
    let mut checked = pages_checked(&mut vm);
    for trip in 1..=TRIPS {
        let (moved, report) = move_on(&uvmm, vm, &format!("host-{trip}"));
        vm = moved;
        let now = pages_checked(&mut vm);
        assert!(now > checked, "the workload does not go on after migration {trip}");
        checked = now;
        println!("migration {trip}: {:.0} ms down, {} rounds", report.downtime_ms, report.rounds);
    }
    let new = complaints(&mut vm).difference(&at_home).cloned().collect::<Vec<_>>();
    assert!(new.is_empty(), "the guest's kernel complains about its travels: {new:#?}");
    vm.serial.send("poweroff -f").unwrap();
    assert_eq!(vm.wait(SHORT).unwrap().code(), Some(0));
}

#[test]
fn a_destination_that_dies_midway_leaves_the_guest_running() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = loaded_guest(&uvmm, "source");
    let before = pages_checked(&mut vm);
    let (mut incoming, address) = uvmm.incoming("incoming").unwrap();
    // So slow that it cannot be over when the destination dies.
    let arguments =
        ["migrate", "--vm", "source", "--to", &address, "--json", "--bandwidth-limit", "4M"];
    let child =
        uvmm.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    uvmm.until_it_copies("source").unwrap();
    incoming.kill();
    let report = Report::of(child, SHORT).unwrap();
    assert_eq!(report.status, "failed");
    assert!(pages_checked(&mut vm) > before);
    // And it is as fit to migrate as before.
    drop(incoming);
    let (mut moved, _) = move_on(&uvmm, vm, "second");
    assert!(pages_checked(&mut moved) > before);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = loaded_guest(&uvmm, "source");
    let before = pages_checked(&mut vm);
    let (_incoming, address) = uvmm.incoming("incoming").unwrap();
    let arguments =
        ["migrate", "--vm", "source", "--to", &address, "--json", "--bandwidth-limit", "4M"];
    let child =
        uvmm.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    uvmm.until_it_copies("source").unwrap();
    assert!(uvmm.call(&["cancel", "--vm", "source"]).unwrap().0.success());
    assert_eq!(Report::of(child, SHORT).unwrap().status, "cancelled");
    assert!(pages_checked(&mut vm) > before);
}

#[test]
fn a_dry_run_prints_the_plan_and_moves_nothing() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = loaded_guest(&uvmm, "source");
    let (mut incoming, address) = uvmm.incoming("incoming").unwrap();
    let (status, plan, errors) =
        uvmm.call(&["migrate", "--vm", "source", "--to", &address, "--dry-run"]).unwrap();
    assert!(status.success(), "{errors}");
    assert!(plan.to_lowercase().contains("stop 2 vcpus"), "{plan}");
    assert!(vm.runs() && incoming.runs());
    pages_checked(&mut vm);
}
