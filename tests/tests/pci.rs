//! A stock Linux finds the PCI buses, and its own driver drives the hot-plug slots.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use tests::inside_lab;
use tests::vm::{BOOT, CMDLINE, SHORT, Uvmm, Vm, variable};

/// Boots with more on the command line, and waits until the guest takes commands.
fn boot(uvmm: &Uvmm, more: &str, arguments: &[&str]) -> Vm {
    let mut all = vec!["--kernel".into(), variable("GUEST_KERNEL").unwrap()];
    all.extend(["--initrd".into(), variable("GUEST_INITRD").unwrap()]);
    all.extend(["--cmdline".into(), format!("{CMDLINE} {more}").into()]);
    all.extend(["--memory", "256M"].iter().chain(arguments).map(Into::into));
    let mut vm = uvmm.run("guest", all).unwrap();
    vm.booted().unwrap();
    vm
}

/// What the guest's shell prints, on one line; it must succeed.
fn says(vm: &mut Vm, line: &str) -> String {
    let (printed, status) = vm.shell(line).unwrap();
    assert_eq!(status, 0, "{line}: {printed}");
    printed.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// How the driver's interrupt arrives, and how often it did so far on all processors together.
fn interrupts(vm: &mut Vm) -> (String, u32) {
    const SUM: &str = "awk '/shpchp/ { n = 0; for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i; \
                       print $i, n }' /proc/interrupts";
    let said = says(vm, SUM);
    let (how, count) = said.split_once(' ').unwrap();
    (how.to_owned(), count.parse().unwrap())
}

/// The driver is bound, has four slots, and hears of the end of each of its commands.
fn drives_its_slots(vm: &mut Vm, interrupt: &str) {
    let bound = says(vm, "ls -d /sys/bus/pci/drivers/shpchp/0000:*");
    assert_eq!(bound, "/sys/bus/pci/drivers/shpchp/0000:00:01.0");
    assert_eq!(says(vm, "cd /sys/bus/pci/slots; echo *"), "1 2 3 4");
    assert_eq!(
        says(vm, "cat /sys/bus/pci/slots/*/address"),
        "0000:01:01 0000:01:02 0000:01:03 0000:01:04"
    );
    assert_eq!(says(vm, "cd /sys/bus/pci/slots; cat */adapter */power"), "0 0 0 0 0 0 0 0");
    let (how, before) = interrupts(vm);
    assert!(how.starts_with(interrupt), "{how}");
    for light in ["1", "0"] {
        says(vm, &format!("echo {light} > /sys/bus/pci/slots/2/attention"));
        assert_eq!(says(vm, "cat /sys/bus/pci/slots/2/attention"), light);
    }
    assert_eq!(interrupts(vm).1, before + 2, "one for each command");
}

#[test]
fn shpchp_drives_the_slots_by_msi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    drives_its_slots(&mut vm, "PCI-MSI");
    // The windows are as uvmm made them, with all the room for devices that come later.
    let windows = says(&mut vm, "grep 'PCI Bus 0000:01' /proc/iomem | cut -d: -f1");
    assert_eq!(windows, "c0000000-cfffffff 400000000-5ffffffff");
    let moved = says(&mut vm, "dmesg | grep -ciE 'BAR .*(failed|assigned)|no space' || true");
    assert_eq!(moved, "0");
}

#[test]
fn shpchp_drives_the_slots_by_intx_with_two_vcpus() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    drives_its_slots(&mut boot(&uvmm, "pci=nomsi", &["--cpus", "2"]), "IO-APIC");
}

#[test]
fn shpchp_drives_the_slots_without_acpi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "acpi=off", &["--cpus", "2"]);
    assert_eq!(says(&mut vm, "nproc"), "2");
    drives_its_slots(&mut vm, "PCI-MSI");
}

#[test]
fn shpchp_drives_the_slots_by_intx_without_acpi() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    drives_its_slots(&mut boot(&uvmm, "acpi=off pci=nomsi", &[]), "IO-APIC");
}

#[test]
fn an_empty_slot_cannot_be_switched_on_and_nothing_breaks() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    for power in ["1", "0", "1"] {
        let line = format!("echo {power} > /sys/bus/pci/slots/1/power");
        assert_ne!(vm.shell(&line).unwrap().1, 0, "{line}");
    }
    assert_eq!(says(&mut vm, "cat /sys/bus/pci/slots/1/power"), "0");
    drives_its_slots(&mut vm, "PCI-MSI");
}

#[test]
fn there_are_as_many_slots_as_asked_for() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &["--pci-slots", "31"]);
    assert_eq!(says(&mut vm, "ls /sys/bus/pci/slots | wc -l"), "31");
    drop(vm);
    let mut vm = boot(&uvmm, "", &["--pci-slots", "0"]);
    assert_eq!(
        says(&mut vm, "cd /sys/bus/pci; echo slots/* devices/*"),
        "slots/* devices/0000:00:00.0"
    );
}

#[test]
fn a_guest_that_writes_everything_everywhere_harms_itself_alone() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
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
    assert_eq!(says(&mut vm, line), "01", "a register that keeps what was written last");
    let (status, _, errors) = uvmm.call(&["info", "--vm", "guest"]).unwrap();
    assert!(status.success() && vm.runs(), "{errors}");
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn shpchp_drives_the_slots_on_after_a_migration() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut from = boot(&uvmm, "", &[]);
    drives_its_slots(&mut from, "PCI-MSI");
    let (mut to, address) = uvmm.incoming("there").unwrap();
    let report = uvmm.migrate(&from, &address).unwrap();
    assert_eq!(report.status, "completed", "{report:?}");
    drives_its_slots(&mut to, "PCI-MSI");
}
