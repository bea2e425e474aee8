//! A Linux guest with the guest driver moves, and its virtual function works until the end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::time::Duration;

use tests::inside_lab;
use tests::network::{Alias, Bulk, GUEST_IP, Pinger};
use tests::vm::{Report, SHORT, Uvmm, Vm, text};

const OFTEN: Duration = Duration::from_millis(100);

/// `--device` for the lab's virtual function that `variable` names.
fn device(id: &str, variable: &str) -> String {
    format!("vfio,id={id},host={}", text(variable).unwrap())
}

/// Boots a guest with `VF0` and the guest driver, and joins the network.
fn networked(uvmm: &Uvmm, more: &str, driver: &str, arguments: &[&str]) -> Vm {
    let device = device("net0", "VF0");
    let mut vm = uvmm.guest(more, &[&["--device", &device], arguments].concat()).unwrap();
    let load = |name: &str| format!("insmod /modules/{name}.ko");
    vm.says(&format!("{} {driver} && {}", load("uvmm_bridge"), load("igbvf"))).unwrap();
    vm.joins_network().unwrap();
    vm
}

/// Moves the guest; the old process must have ended well.
fn move_on(uvmm: &Uvmm, mut from: Vm, to: &str, device: &str) -> (Vm, Report) {
    let (vm, address) = uvmm.incoming_with(to, &["--device", device]).unwrap();
    let report = uvmm.migrate(&from, &address).unwrap();
    let errors = [from.errors().unwrap(), vm.errors().unwrap()].concat();
    assert_eq!(report.status, "completed", "{report:?}\n{errors}");
    assert_eq!(from.wait(SHORT).unwrap().code(), Some(0), "{errors}");
    (vm, report)
}

/// Asserts that the guest's one device moved in this way; gives how long the guest was without it.
fn moved_by(report: &Report, strategy: &str) -> f64 {
    let [device] = &report.devices[..] else { panic!("{report:?}") };
    assert_eq!((&*device.id, &*device.strategy), ("net0", strategy), "{report:?}");
    device.paused_ms
}

#[test]
fn a_paused_function_keeps_its_address_and_its_connections_from_trip_to_trip() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let mut vm = networked(&uvmm, "", "", &[]);
    vm.says("guest-load 8 1 /run/load & sleep 2").unwrap();
    let bulk = Bulk::start(&mut vm).unwrap();
    for (trip, function) in ["VF1", "VF0"].iter().cycle().take(4).enumerate() {
        let pinger = Pinger::start(GUEST_IP, OFTEN).unwrap();
        let (moved, report) =
            move_on(&uvmm, vm, &format!("host-{trip}"), &device("net0", function));
        vm = moved;
        let paused = moved_by(&report, "pause");
        vm.pings().unwrap();
        let answers = pinger.finish().unwrap();
        println!(
            "trip {trip}: paused {paused} ms, outage {:?}, down {} total {} rate {}",
            answers.outage, report.downtime_ms, report.total_ms, report.throughput_mib_s
        );
        assert!(vm.says("cat /run/load").unwrap().contains("pages="));
    }
    println!("{} bytes", bulk.finish(&mut vm).unwrap());
    println!("{}", vm.says("dmesg | grep uvmm_bridge").unwrap());
}
