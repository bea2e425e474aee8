//! A stock Linux drives a virtual function of the host's NIC behind the hot-plug bridge.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread;

use tests::inside_lab;
use tests::vm::{Uvmm, Vm, text};

/// Bytes that are carried each way.
const BULK: usize = 8 << 20;

/// Boots with the virtual function `VF0`, and more on the command line.
fn boot(uvmm: &Uvmm, more: &str, arguments: &[&str]) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    uvmm.guest(more, &[&["--device", &device], arguments].concat()).unwrap()
}

/// Loads the driver, if it is not there, and joins the network of the lab.
fn join_network(vm: &mut Vm) {
    vm.says("[ -d /sys/module/igbvf ] || insmod /modules/igbvf.ko").unwrap();
    vm.until("[ -d /sys/bus/pci/devices/0000:01:01.0/net/eth0 ]").unwrap();
    vm.says("ip link set eth0 up && ip address add 10.7.0.2/24 dev eth0").unwrap();
    vm.until("grep -q 1 /sys/class/net/eth0/carrier").unwrap();
    pings(vm);
}

fn pings(vm: &mut Vm) {
    let said = vm.says(&format!("ping -c 5 -i 0.2 -W 5 {}", text("PEER_IP").unwrap())).unwrap();
    assert!(said.contains(" 0% packet loss"), "{said}");
}

/// Carries data both ways and compares what arrived.
fn carries(vm: &mut Vm) {
    let peer = text("PEER_IP").unwrap();
    let listener = TcpListener::bind((peer.as_str(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let line = format!(
        "head -c {BULK} /dev/urandom > /tmp/sent; nc {peer} {port} < /tmp/sent > /tmp/back; \
         cmp /tmp/sent /tmp/back && wc -c < /tmp/back"
    );
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = vec![0; BULK];
            stream.read_exact(&mut all).unwrap();
            stream.write_all(&all).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            drop(stream.read_to_end(&mut Vec::new()));
        });
        assert_eq!(vm.says(&line).unwrap(), BULK.to_string());
    });
}

/// How many accesses to memory uvmm had to answer for the guest so far.
fn exits(uvmm: &Uvmm) -> u64 {
    let (status, info, errors) = uvmm.call(&["info", "--vm", "guest", "--json"]).unwrap();
    assert!(status.success(), "{errors}");
    let (_, rest) = info.split_once("\"exits-mmio\":").unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// The whole of what a network function is for, in a guest that has just booted.
fn works(uvmm: &Uvmm, vm: &mut Vm) {
    assert_eq!(
        vm.says("cd /sys/bus/pci/slots/1; cat address adapter power").unwrap(),
        "0000:01:01 1 1"
    );
    join_network(vm);
    let before = exits(uvmm);
    carries(vm);
    let packets = vm.says("cat /sys/class/net/eth0/statistics/rx_packets").unwrap();
    assert!(packets.parse::<u64>().unwrap() > 4000, "{packets}");
    assert_eq!(exits(uvmm), before, "neither packets nor interrupts need uvmm");
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn a_virtual_function_carries_data_without_the_help_of_uvmm() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    works(&uvmm, &mut vm);
    assert_ne!(vm.says("grep -c 'PCI-MSIX.*eth0' /proc/interrupts").unwrap(), "0");
}

#[test]
fn a_virtual_function_works_with_two_vcpus_and_without_acpi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    works(&uvmm, &mut boot(&uvmm, "acpi=off", &["--cpus", "2"]));
}

#[test]
fn a_driver_can_let_go_of_a_function_and_take_it_again() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &["--cpus", "2"]);
    join_network(&mut vm);
    for _ in 0..2 {
        vm.says("echo 0000:01:01.0 > /sys/bus/pci/drivers/igbvf/unbind").unwrap();
        let device = "/sys/bus/pci/devices/0000:01:01.0";
        assert!(vm.says(&format!("cat {device}/reset_method")).unwrap().starts_with("flr"));
        vm.says(&format!("echo 1 > {device}/reset")).unwrap();
        vm.says("echo 0000:01:01.0 > /sys/bus/pci/drivers/igbvf/bind").unwrap();
        join_network(&mut vm);
    }
    for _ in 0..2 {
        vm.says("echo 0 > /sys/bus/pci/slots/1/power").unwrap();
        assert_eq!(
            vm.says("echo /sys/bus/pci/devices/0000:01:*").unwrap(),
            "/sys/bus/pci/devices/0000:01:*"
        );
        vm.says("echo 1 > /sys/bus/pci/slots/1/power").unwrap();
        join_network(&mut vm);
    }
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn a_guest_that_reboots_finds_its_function_as_new() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    join_network(&mut vm);
    vm.serial.send("reboot -f").unwrap();
    vm.booted().unwrap();
    works(&uvmm, &mut vm);
}

#[test]
fn a_function_that_cannot_be_had_is_refused_with_the_reason() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let refused = |host: &str, says: &str| {
        let device = format!("vfio,id=net0,host={host}");
        let arguments = ["run", "--name", "other", "--serial", "null", "--device", &device];
        let (status, _, errors) = uvmm.call(&arguments).unwrap();
        assert_eq!(status.code(), Some(1), "{errors}");
        assert!(errors.contains(says) && errors.lines().count() == 1, "{errors}");
    };
    refused("0000:7f:00.0", "there is no device");
    refused("0000:01:00.0", "bound to the driver igb: as root, modprobe vfio-pci");
    refused("/sys/class/net", "there is no device");
    let _vm = boot(&uvmm, "", &[]);
    refused(&text("VF0").unwrap(), "is in use");
}

#[test]
fn the_doctor_tells_what_keeps_a_device_from_a_guest() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let examine = |device: &str| {
        let (status, table, errors) = uvmm.call(&["doctor", "--device", device]).unwrap();
        assert_eq!(errors, "");
        (status.code().unwrap(), table)
    };
    let (status, table) = examine(&text("VF0").unwrap());
    assert_eq!(status, 0, "{table}");
    assert!(table.contains("a virtual function of 0000:01:00.0"), "{table}");
    let (status, table) = examine("0000:01:00.0");
    assert_eq!(status, 1, "{table}");
    assert!(table.contains("igb ") && table.contains("> /sys/bus/pci/drivers_probe"), "{table}");
    let _vm = boot(&uvmm, "", &[]);
    let (status, table) = examine(&text("VF0").unwrap());
    assert_eq!(status, 1, "{table}");
    assert!(table.contains("fuser /dev/vfio/"), "{table}");
}
