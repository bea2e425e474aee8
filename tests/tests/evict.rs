//! A Linux guest that owns a virtual function moves, and has another one where it arrives.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm, text};

/// `--device` for the lab's virtual function that `variable` names.
fn device(id: &str, variable: &str) -> String {
    format!("vfio,id={id},host={}", text(variable).unwrap())
}

/// Boots a guest that has `VF0` in its first slot, and joins the network.
fn networked(uvmm: &Uvmm, more: &str) -> Vm {
    let mut vm = uvmm.guest(more, &["--device", &device("net0", "VF0")]).unwrap();
    vm.joins_network_after("").unwrap();
    vm
}

#[test]
fn a_stock_guest_lets_go_of_its_function_and_is_given_another() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let vm = networked(&uvmm, "");
    let (mut vm, report) = uvmm.move_on(vm, "there", &[&device("net0", "VF1")]).unwrap();
    let [moved] = &report.devices[..] else { panic!("{report:?}") };
    assert_eq!((&*moved.id, &*moved.strategy), ("net0", "evict"));
    assert!(moved.paused_ms > report.downtime_ms, "{report:?}");
    vm.joins_network().unwrap();
    let (mut vm, _) = uvmm.move_on(vm, "back", &[&device("net0", "VF0")]).unwrap();
    vm.joins_network().unwrap();
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn whatever_is_planned_or_goes_wrong_a_stock_guest_has_its_function() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = networked(&uvmm, "");
    a_dry_run_tells_how_it_would_move_and_what_would_be_better(&uvmm);
    what_takes_memory_alone_is_refused(&uvmm);
    vm.pings().unwrap();
    // Nothing was asked of the guest yet: its address is still there.
    for (arguments, reason) in [
        (vec![], "device/net0: wanted a device of this id, found none"),
        (vec![device("net1", "VF1")], "device/net1: wanted none"),
        (vec!["vfio,id=net0,host=0000:7f:00.0".to_owned()], "there is no device"),
        (vec![device("net0", "VF0")], "in use"),
    ] {
        let arguments: Vec<_> = arguments.iter().flat_map(|d| ["--device", d]).collect();
        let (mut there, address) = uvmm.incoming_with("refuses", &arguments).unwrap();
        let report = uvmm.migrate(&vm, &address).unwrap();
        let error = report.error.unwrap();
        assert!(report.status == "failed" && error.contains(reason), "{error}");
        assert!(there.runs(), "it waits for another guest");
        vm.pings().unwrap();
    }
    // It is out, and memory is on its way.
    let (there, address) =
        uvmm.incoming_with("there", &["--device", &device("net0", "VF1")]).unwrap();
    let child = uvmm.begin_to_migrate(&vm, &address, &["--bandwidth-limit", "4M"]).unwrap();
    uvmm.until_it_copies("guest").unwrap();
    vm.until("! [ -e /sys/class/net/eth0 ]").unwrap();
    drop(there);
    assert_eq!(Report::of(child, SHORT).unwrap().status, "failed");
    vm.joins_network().unwrap();
    let (mut vm, _) = uvmm.move_on(vm, "second", &[&device("net0", "VF1")]).unwrap();
    vm.joins_network().unwrap();
}

fn a_dry_run_tells_how_it_would_move_and_what_would_be_better(uvmm: &Uvmm) {
    let (_there, address) =
        uvmm.incoming_with("planned", &["--device", &device("net0", "VF1")]).unwrap();
    let (status, plan, errors) =
        uvmm.call(&["migrate", "--vm", "guest", "--to", &address, "--dry-run"]).unwrap();
    assert!(status.success(), "{errors}");
    for line in [
        "precopy  unplug net0",
        "quiesce  stop the vCPU",
        "net0: evict: the guest does not tell what the device writes",
        "better: load the guest driver",
    ] {
        assert!(plan.contains(line), "{plan}");
    }
}

/// A snapshot, and a hand-over of memory, would leave the guest's function behind.
fn what_takes_memory_alone_is_refused(uvmm: &Uvmm) {
    let file = uvmm.dir().join("guest.snap");
    let snapshot = ["snapshot", "--vm", "guest", file.to_str().unwrap()];
    let shared = ["migrate", "--vm", "guest", "--to", "unix:/run/nobody", "--shared-memory"];
    for (command, what) in [(&snapshot[..], "be written"), (&shared[..], "hand over its memory")] {
        let (status, _, errors) = uvmm.call(command).unwrap();
        let expected = format!("a guest cannot {what} with devices of the host, and it has net0");
        let is_one_line = errors.trim().lines().count() == 1;
        assert!(!status.success() && is_one_line && errors.contains(&expected), "{errors}");
    }
    assert!(!file.exists());
}
