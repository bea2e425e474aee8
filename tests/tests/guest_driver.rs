//! The guest driver in a stock Linux: what it promises, and that nobody else notices it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::path::PathBuf;

use tests::inside_lab;
use tests::vm::{Uvmm, Vm, text, variable};

const LOAD: &str = "insmod $modules/uvmm_bridge.ko";
const LOAD_NIC: &str = "insmod $modules/igbvf.ko";

/// Bits of the control register.
const PROMISES: u32 = 1 << 0;
const CAN_PAUSE: u32 = 1 << 1;
const LISTENS: u32 = 1 << 31;

/// Boots with the virtual function `VF0`, and more on the command line.
fn boot(uvmm: &Uvmm, more: &str) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    uvmm.guest(more, &["--cpus", "2", "--device", &device]).unwrap()
}

/// Runs a line with `$modules` as where the modules of this kernel are.
fn says(vm: &mut Vm, line: &str) -> String {
    let find = "modules=/modules/$(uname -r); [ -d $modules ] || modules=/modules";
    vm.says(&format!("{find}; {line}")).unwrap()
}

/// The control register of the migration block, which begins at 0x5c.
fn control(vm: &mut Vm) -> u32 {
    let line = "od -An -tx4 -j108 -N4 /sys/bus/pci/devices/0000:00:01.0/config";
    u32::from_str_radix(&vm.says(line).unwrap(), 16).unwrap()
}

/// Waits until the control register says `wanted`: the driver works it out on a thread of its own.
fn promises(vm: &mut Vm, wanted: u32) {
    for _ in 0..50 {
        if control(vm) == wanted {
            return;
        }
        vm.says("sleep 0.1").unwrap();
    }
    assert_eq!(format!("{:#x}", control(vm)), format!("{wanted:#x}"));
}

/// Joins the network of the lab, and carries data.
fn works(vm: &mut Vm) {
    vm.until("[ -d /sys/bus/pci/devices/0000:01:01.0/net/eth0 ]").unwrap();
    vm.says("ip link set eth0 up && ip address replace 10.7.0.2/24 dev eth0").unwrap();
    vm.until("grep -q 1 /sys/class/net/eth0/carrier").unwrap();
    pings(vm);
}

fn pings(vm: &mut Vm) {
    let peer = text("PEER_IP").unwrap();
    let said = vm.says(&format!("ping -c 5 -i 0.2 -s 1400 -W 5 {peer}")).unwrap();
    assert!(said.contains(" 0% packet loss"), "{said}");
}

fn is_well(vm: &mut Vm) {
    let complaints =
        "dmesg | grep -E 'WARNING|BUG:|Call Trace|Oops|nobody cared|uvmm_bridge.*cannot' || true";
    assert_eq!(vm.says(complaints).unwrap(), "");
    assert_eq!(vm.errors().unwrap(), "");
}

/// The bridge is shpchp's, which drives its slots.
fn shpchp_works(vm: &mut Vm) {
    let bound = vm.says("ls -d /sys/bus/pci/drivers/shpchp/0000:*").unwrap();
    assert_eq!(bound, "/sys/bus/pci/drivers/shpchp/0000:00:01.0");
    for light in ["1", "0"] {
        vm.says(&format!("echo {light} > /sys/bus/pci/slots/2/attention")).unwrap();
        assert_eq!(vm.says("cat /sys/bus/pci/slots/2/attention").unwrap(), light);
    }
}

/// All of it, in a guest that has just booted.
fn comes_and_goes(vm: &mut Vm) {
    assert_eq!(control(vm), 0);
    says(vm, LOAD);
    promises(vm, PROMISES | CAN_PAUSE | LISTENS);
    let shared = vm.says("grep -c 'shpchp.*uvmm_bridge' /proc/interrupts").unwrap();
    assert_eq!(shared, "1", "one interrupt for both");
    says(vm, LOAD_NIC);
    works(vm);
    shpchp_works(vm);
    promises(vm, PROMISES | CAN_PAUSE | LISTENS);
    // While the network is in use.
    let peer = text("PEER_IP").unwrap();
    vm.says(&format!("ping -c 100 -i 0.02 -s 1400 -q {peer} > /tmp/said &")).unwrap();
    vm.says("rmmod uvmm_bridge").unwrap();
    assert_eq!(control(vm), 0);
    vm.until("! pidof ping > /dev/null").unwrap();
    pings(vm);
    shpchp_works(vm);

    // What the network's driver shares with its device by now is known to nobody.
    says(vm, LOAD);
    promises(vm, CAN_PAUSE | LISTENS);
    vm.says("rmmod igbvf").unwrap();
    promises(vm, PROMISES | CAN_PAUSE | LISTENS);
    vm.says("rmmod uvmm_bridge").unwrap();
    says(vm, LOAD_NIC);
    works(vm);
    says(vm, &format!("{LOAD} rebind=1"));
    promises(vm, PROMISES | CAN_PAUSE | LISTENS);
    works(vm);
    vm.says("rmmod uvmm_bridge").unwrap();
    pings(vm);
    is_well(vm);
}

#[test]
fn it_comes_and_goes_beside_shpchp_and_polls_without_it() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "");
    says(&mut vm, LOAD);
    promises(&mut vm, PROMISES | CAN_PAUSE | LISTENS);
    for _ in 0..2 {
        vm.says("echo 0000:00:01.0 > /sys/bus/pci/drivers/shpchp/unbind").unwrap();
        promises(&mut vm, PROMISES | CAN_PAUSE);
        vm.says("echo 0000:00:01.0 > /sys/bus/pci/drivers/shpchp/bind").unwrap();
        promises(&mut vm, PROMISES | CAN_PAUSE | LISTENS);
    }
    shpchp_works(&mut vm);
    vm.says("rmmod uvmm_bridge").unwrap();
    comes_and_goes(&mut vm);
}

#[test]
fn it_comes_and_goes_on_another_kernel() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let kernel = PathBuf::from(variable("GUEST_OTHER_KERNEL").unwrap());
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    let arguments = ["--memory", "256M", "--cpus", "2", "--device", &device];
    let mut vm = uvmm.linux("guest", &kernel, &arguments).unwrap();
    vm.booted().unwrap();
    comes_and_goes(&mut vm);
}

#[test]
fn a_guest_that_bounces_promises_whenever_the_driver_comes() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "swiotlb=force");
    says(&mut vm, LOAD_NIC);
    works(&mut vm);
    says(&mut vm, LOAD);
    promises(&mut vm, PROMISES | CAN_PAUSE | LISTENS);
    pings(&mut vm);
    vm.says("rmmod uvmm_bridge").unwrap();
    is_well(&mut vm);
}

#[test]
fn it_shares_the_pin_of_the_bridge_where_there_is_no_msi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "pci=nomsi");
    says(&mut vm, LOAD);
    promises(&mut vm, PROMISES | CAN_PAUSE | LISTENS);
    let shared = "grep -c 'IO-APIC.*shpchp.*uvmm_bridge' /proc/interrupts";
    assert_eq!(vm.says(shared).unwrap(), "1");
    shpchp_works(&mut vm);
    vm.says("rmmod uvmm_bridge").unwrap();
    shpchp_works(&mut vm);
    is_well(&mut vm);
}
