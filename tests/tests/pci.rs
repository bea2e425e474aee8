//! A stock Linux finds the PCI buses, and its own driver drives the hot-plug slots.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use tests::inside_lab;
use tests::vm::{BOOT, SHORT, Uvmm, Vm};

/// How the driver's interrupt arrives, and how often it did so far on all processors together.
fn interrupts(vm: &mut Vm) -> (String, u32) {
    const SUM: &str = "awk '/shpchp/ { n = 0; for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i; \
                       print $i, n }' /proc/interrupts";
    let said = vm.says(SUM).unwrap();
    let (how, count) = said.split_once(' ').unwrap();
    (how.to_owned(), count.parse().unwrap())
}

/// The driver is bound, has four slots, and hears of the end of each of its commands.
fn drives_its_slots(vm: &mut Vm, interrupt: &str) {
    let bound = vm.says("ls -d /sys/bus/pci/drivers/shpchp/0000:*").unwrap();
    assert_eq!(bound, "/sys/bus/pci/drivers/shpchp/0000:00:01.0");
    assert_eq!(vm.says("cd /sys/bus/pci/slots; echo *").unwrap(), "1 2 3 4");
    assert_eq!(
        vm.says("cat /sys/bus/pci/slots/*/address").unwrap(),
        "0000:01:01 0000:01:02 0000:01:03 0000:01:04"
    );
    assert_eq!(vm.says("cd /sys/bus/pci/slots; cat */adapter */power").unwrap(), "0 0 0 0 0 0 0 0");
    let (how, before) = interrupts(vm);
    assert!(how.starts_with(interrupt), "{how}");
    for light in ["1", "0"] {
        vm.says(&format!("echo {light} > /sys/bus/pci/slots/2/attention")).unwrap();
        assert_eq!(vm.says("cat /sys/bus/pci/slots/2/attention").unwrap(), light);
    }
    assert_eq!(interrupts(vm).1, before + 2, "one for each command");
}

#[test]
fn shpchp_drives_the_slots_by_msi_and_on_after_a_migration() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = uvmm.guest("", &[]).unwrap();
    drives_its_slots(&mut vm, "PCI-MSI");
    // The windows are as uvmm made them, with all the room for devices that come later.
    let windows = vm.says("grep 'PCI Bus 0000:01' /proc/iomem | cut -d: -f1").unwrap();
    assert_eq!(windows, "c0000000-cfffffff 400000000-5ffffffff");
    let moved = vm.says("dmesg | grep -ciE 'BAR .*(failed|assigned)|no space' || true").unwrap();
    assert_eq!(moved, "0");
    an_empty_slot_cannot_be_switched_on(&mut vm);
    drives_its_slots(&mut vm, "PCI-MSI");

    let (mut to, address) = uvmm.incoming("there").unwrap();
    let report = uvmm.migrate(&vm, &address).unwrap();
    assert_eq!(report.status, "completed", "{report:?}");
    drives_its_slots(&mut to, "PCI-MSI");
}

fn an_empty_slot_cannot_be_switched_on(vm: &mut Vm) {
    for power in ["1", "0", "1"] {
        let line = format!("echo {power} > /sys/bus/pci/slots/1/power");
        assert_ne!(vm.shell(&line).unwrap().1, 0, "{line}");
    }
    assert_eq!(vm.says("cat /sys/bus/pci/slots/1/power").unwrap(), "0");
}

#[test]
fn shpchp_drives_the_slots_by_intx_with_two_vcpus() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    drives_its_slots(&mut uvmm.guest("pci=nomsi", &["--cpus", "2"]).unwrap(), "IO-APIC");
}

#[test]
fn shpchp_drives_the_slots_without_acpi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = uvmm.guest("acpi=off", &["--cpus", "2"]).unwrap();
    assert_eq!(vm.says("nproc").unwrap(), "2");
    drives_its_slots(&mut vm, "PCI-MSI");
}

#[test]
fn shpchp_drives_the_slots_by_intx_without_acpi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    drives_its_slots(&mut uvmm.guest("acpi=off pci=nomsi", &[]).unwrap(), "IO-APIC");
}

#[test]
fn there_are_as_many_slots_as_asked_for() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = uvmm.guest("", &["--pci-slots", "31"]).unwrap();
    assert_eq!(vm.says("ls /sys/bus/pci/slots | wc -l").unwrap(), "31");
    drop(vm);
    let mut vm = uvmm.guest("", &["--pci-slots", "0"]).unwrap();
    assert_eq!(
        vm.says("cd /sys/bus/pci; echo slots/* devices/*").unwrap(),
        "slots/* devices/0000:00:00.0"
    );
}

#[test]
fn a_guest_that_writes_everything_everywhere_harms_itself_alone() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = uvmm.guest("", &[]).unwrap();
    // Everything but the identity: the headers, the capabilities and, through them, the working
    // registers of the hot-plug controller, which show at 0x54 what is selected at 0x52.
    let everywhere = "cd /sys/bus/pci/devices; for byte in '\\377' '\\0' '\\125' '\\252' '\\1'; do \
                      for device in 0000:00:01.0 0000:00:00.0; do for size in 1 4; do \
                      head -c 252 /dev/zero | tr '\\0' $byte | \
                      dd of=$device/config bs=$size seek=$((4 / size)) conv=notrunc; \
                      done; done; done 2> /dev/null";
    let registers = "for select in 000 003 004 005 006 007 010 011 012 013 014 015 016 377; do \
                     for bytes in '\\377\\377\\377\\377' '\\111\\1\\0\\0' '\\0\\0\\0\\0'; do \
                     printf \\\\$select | dd of=0000:00:01.0/config bs=1 seek=82 conv=notrunc; \
                     printf $bytes | dd of=0000:00:01.0/config bs=4 seek=21 conv=notrunc; \
                     done; done 2> /dev/null; echo all' 'written";
    vm.serial.send(&format!("{everywhere}; {registers}")).unwrap();
    let line = "od -An -tx1 -j60 -N1 /sys/bus/pci/devices/0000:00:01.0/config";
    vm.serial.expect("all written", BOOT).unwrap();
    vm.serial.expect("uvmm-guest: status 0", SHORT).unwrap();
    assert_eq!(vm.says(line).unwrap(), "01", "a register that keeps what was written last");
    let (status, _, errors) = uvmm.call(&["info", "--vm", "guest"]).unwrap();
    assert!(status.success() && vm.runs(), "{errors}");
    assert_eq!(vm.errors().unwrap(), "");
}
