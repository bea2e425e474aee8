//! Conventional functions of the host in a stock Linux: they interrupt by their pins, and share an
//! IOMMU group.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use tests::inside_lab;
use tests::program;
use tests::vm::{Uvmm, Vm, text};

/// Guests with virtual functions, which run meanwhile, have another.
const OWN_IP: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 3);
/// Bytes that are carried each way.
const BULK: usize = 4 << 20;

/// `--device` for the NIC that `variable` names.
fn device(id: &str, variable: &str, slot: u8) -> String {
    format!("vfio,id={id},host={},slot={slot}", text(variable).unwrap())
}

/// The interrupt of `user`, and how often it arrived at all processors together.
fn interrupts(vm: &mut Vm, user: &str) -> (String, u64) {
    let sum = format!(
        "awk '/{user}/ {{ n = 0; for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i; \
         printf \"%d \", n; for (; i <= NF; i++) printf \"%s \", $i }}' /proc/interrupts"
    );
    let said = vm.says(&sum).unwrap();
    let (count, what) = said.split_once(' ').unwrap();
    (what.to_owned(), count.parse().unwrap())
}

#[test]
fn interrupts_by_pin_arrive_also_on_a_line_that_is_shared() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    // The pins of slot 4 are wired like the bridge's own.
    let (alone, shares) = (device("alone", "NIC0", 1), device("shares", "NIC1", 4));
    let arguments = ["--cpus", "2", "--device", &alone, "--device", &shares];
    let mut vm = uvmm.guest("pci=nomsi", &arguments).unwrap();
    vm.says("insmod /modules/e1000.ko").unwrap();
    let name = vm.joins_network_by(1, OWN_IP).unwrap();
    let exits = uvmm.mmio_exits("guest").unwrap();
    vm.exchanges(BULK).unwrap();
    assert_eq!(uvmm.mmio_exits("guest").unwrap(), exits, "interrupts do not need uvmm");
    let (what, count) = interrupts(&mut vm, &name);
    assert!(what.starts_with("IO-APIC") && !what.contains("shpchp"), "{what}");
    assert!(count > 100, "each is unmasked when it ended, or there were but one: {count}");

    let name = vm.joins_network_by(4, OWN_IP).unwrap();
    vm.exchanges(BULK).unwrap();
    let (what, count) = interrupts(&mut vm, &name);
    assert!(what.starts_with("IO-APIC") && what.contains("shpchp"), "{what}");
    assert!(count > 100, "{count}");
    vm.says("echo 1 > /sys/bus/pci/slots/2/attention").unwrap();
    assert_eq!(vm.says("cat /sys/bus/pci/slots/2/attention").unwrap(), "1");
    vm.says("rmmod e1000 && insmod /modules/e1000.ko").unwrap();
    vm.joins_network_by(1, OWN_IP).unwrap();
    vm.joins_network_by(4, OWN_IP).unwrap();
    assert_eq!(vm.errors().unwrap(), "");
    // All of the group is this guest's.
    let (status, _, errors) =
        uvmm.call(&["run", "--name", "other", "--serial", "null", "--device", &shares]).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("is in use"), "{errors}");
}

/// A function that a driver of the host has for as long as this lives; then it is VFIO's again.
struct Taken(String);

impl Taken {
    fn by(driver: &str, name: String) -> Self {
        program::run(Command::new("modprobe").arg(driver)).unwrap();
        let taken = Self(name);
        taken.give_to(driver);
        taken
    }

    fn give_to(&self, driver: &str) {
        let device = PathBuf::from("/sys/bus/pci/devices").join(&self.0);
        drop(fs::write(device.join("driver/unbind"), &self.0));
        fs::write(device.join("driver_override"), driver).unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &self.0).unwrap();
        let now = fs::read_link(device.join("driver")).unwrap();
        assert!(now.ends_with(driver), "{}", now.display());
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.give_to("vfio-pci");
    }
}

#[test]
fn a_function_is_refused_while_the_host_uses_another_of_its_group() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let (name, other) = (text("NIC0").unwrap(), text("NIC1").unwrap());
    let group =
        |name: &str| fs::read_link(format!("/sys/bus/pci/devices/{name}/iommu_group")).unwrap();
    assert_eq!(group(&name), group(&other));
    let doctor = || uvmm.call(&["doctor", "--device", &name]).unwrap();
    let (status, table, _) = doctor();
    assert!(status.success(), "{table}");

    let taken = Taken::by("e1000", other.clone());
    let remedy = format!("echo {other} > /sys/bus/pci/devices/{other}/driver/unbind");
    let (status, table, _) = doctor();
    assert_eq!(status.code(), Some(1), "{table}");
    assert!(table.contains(&format!("{other} (e1000)")) && table.contains(&remedy), "{table}");
    let device = device("net0", "NIC0", 1);
    let arguments = ["run", "--name", "other", "--serial", "null", "--device", &device];
    let (status, _, errors) = uvmm.call(&arguments).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains(&format!("with {other} (e1000)")), "{errors}");
    assert!(errors.contains(&remedy) && errors.lines().count() == 1, "{errors}");

    // What the remedy does.
    fs::write(format!("/sys/bus/pci/devices/{other}/driver/unbind"), &other).unwrap();
    let (status, table, _) = doctor();
    assert!(status.success(), "{table}");
    drop(taken);
    let (status, table, _) = doctor();
    assert!(status.success(), "{table}");
}
