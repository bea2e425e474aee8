//! Stock Linux kernels boot, use what they are given, and end as guests end.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::path::PathBuf;

use tests::inside_lab;
use tests::vm::{BOOT, CMDLINE, SHORT, Uvmm, Vm, variable};

fn kernel(variable_name: &str) -> PathBuf {
    variable(variable_name).unwrap().into()
}

/// Boots the kernel that the variable names, and waits until the guest takes commands.
fn boot(uvmm: &Uvmm, kernel_variable: &str, arguments: &[&str]) -> Vm {
    let mut vm = uvmm.linux("guest", &kernel(kernel_variable), arguments).unwrap();
    vm.booted().unwrap();
    vm
}

fn powers_off(mut vm: Vm) {
    vm.serial.send("poweroff -f").unwrap();
    let status = vm.wait(SHORT).unwrap();
    assert_eq!(status.code(), Some(0), "{}", vm.errors().unwrap());
    assert_eq!(vm.errors().unwrap(), "", "a guest that powers off is nothing to complain about");
}

#[test]
fn a_bzimage_boots_starts_again_and_powers_off_when_asked() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "GUEST_KERNEL", &["--memory", "256M"]);
    let (version, status) = vm.shell("uname -r; nproc").unwrap();
    assert_eq!(status, 0);
    assert!(version.trim().ends_with("\n1"), "one processor unless told otherwise: {version:?}");
    vm.serial.send("reboot -f").unwrap();
    vm.booted().unwrap();
    // The power button.
    let (_, status) = vm.shell("until pidof acpid; do sleep 0.1; done").unwrap();
    assert_eq!(status, 0);
    let (status, _, errors) = uvmm.call(&["stop", "--vm", "guest"]).unwrap();
    assert!(status.success(), "{errors}");
    assert_eq!(vm.wait(SHORT).unwrap().code(), Some(0), "{}", vm.errors().unwrap());
}

#[test]
fn a_kernel_that_is_not_the_labs_own_boots() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "GUEST_OTHER_KERNEL", &["--memory", "256M"]);
    let (version, _) = vm.shell("uname -r").unwrap();
    assert!(!kernel("GUEST_KERNEL").display().to_string().ends_with(version.trim()), "{version}");
    powers_off(vm);
}

#[test]
fn eight_vcpus_and_five_gib_are_all_there() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "GUEST_KERNEL", &["--memory", "5G", "--cpus", "8"]);
    let (said, _) = vm.shell("nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo").unwrap();
    let numbers =
        said.split_whitespace().map(|word| word.parse::<u64>().unwrap()).collect::<Vec<_>>();
    let [cpus, kib] = numbers[..] else { panic!("{said}") };
    assert_eq!(cpus, 8);
    assert!((4_800 << 10..=5 << 20).contains(&kib), "{kib} KiB of the 5 GiB");
    powers_off(vm);
}

#[test]
fn the_smallest_guest_boots() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    // Linux with its initial file system does not fit into 64 MiB; the built-in guest does.
    let mut vm = uvmm.run("small", vec!["--memory".into(), "64M".into()]).unwrap();
    vm.serial.expect("uvmm tiny guest", SHORT).unwrap();
    vm.serial.send("poweroff").unwrap();
    assert_eq!(vm.wait(SHORT).unwrap().code(), Some(0));
}

#[test]
fn a_guest_that_dies_is_told_apart_from_one_that_powers_off() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let arguments = ["--memory", "256M", "--cmdline", "console=ttyS0 quiet reboot=t panic=-1"];
    let mut all = vec!["--kernel".into(), variable("GUEST_KERNEL").unwrap()];
    all.extend(["--initrd".into(), variable("GUEST_INITRD").unwrap()]);
    all.extend(arguments.map(Into::into));
    let mut vm = uvmm.run("guest", all).unwrap();
    vm.booted().unwrap();
    vm.serial.send("echo c > /proc/sysrq-trigger").unwrap();
    let status = vm.wait(SHORT).unwrap();
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    let said = vm.errors().unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("triple fault"), "{said}");
}

#[test]
fn an_elf_kernel_boots_through_its_pvh_entry_and_its_serial_line_can_go_to_a_file() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let file = uvmm.dir().join("console");
    let mut command = uvmm.command(["run", "--memory", "256M", "--cmdline"]);
    command.arg(CMDLINE).arg("--kernel").arg(kernel("GUEST_VMLINUX"));
    command.arg("--initrd").arg(kernel("GUEST_INITRD"));
    let mut child = command.arg(format!("--serial=file={}", file.display())).spawn().unwrap();
    let deadline = std::time::Instant::now() + BOOT;
    let found = loop {
        let text = std::fs::read(&file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        if text.contains("uvmm-guest: ready") {
            break true;
        }
        if std::time::Instant::now() > deadline || child.try_wait().unwrap().is_some() {
            break false;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found, "the guest's first program wrote nothing into the file");
}
