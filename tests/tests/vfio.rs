//! A stock Linux drives a virtual function of the host's NIC behind the hot-plug bridge.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use tests::inside_lab;
use tests::vm::{SHORT, Uvmm, Vm, text, variable};

/// Bytes that are carried each way.
const BULK: usize = 4 << 20;

/// Boots with the virtual function `VF0`, and more on the command line.
fn boot(uvmm: &Uvmm, more: &str, arguments: &[&str]) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    uvmm.guest(more, &[&["--device", &device], arguments].concat()).unwrap()
}

/// A guest that has `VF0`, and does nothing with it.
fn holds(uvmm: &Uvmm) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    let mut vm = uvmm.run("holds", vec!["--device".into(), device.into()]).unwrap();
    vm.serial.expect("uvmm tiny guest", SHORT).unwrap();
    vm
}

/// Loads the driver, if it is not there, and joins the network of the lab.
fn join_network(vm: &mut Vm) {
    vm.says("[ -d /sys/module/igbvf ] || insmod /modules/igbvf.ko").unwrap();
    vm.until("[ -d /sys/bus/pci/devices/0000:01:01.0/net/eth0 ]").unwrap();
    vm.says("ip link set eth0 up && ip address add 10.7.0.2/24 dev eth0").unwrap();
    vm.until("grep -q 1 /sys/class/net/eth0/carrier").unwrap();
    vm.pings().unwrap();
}

/// The whole of what a network function is for, in a guest that has just booted.
fn works(uvmm: &Uvmm, vm: &mut Vm) {
    assert_eq!(
        vm.says("cd /sys/bus/pci/slots/1; cat address adapter power").unwrap(),
        "0000:01:01 1 1"
    );
    join_network(vm);
    let before = uvmm.mmio_exits("guest").unwrap();
    vm.exchanges(BULK).unwrap();
    let packets = vm.says("cat /sys/class/net/eth0/statistics/rx_packets").unwrap();
    assert!(packets.parse::<u64>().unwrap() > 2000, "{packets}");
    assert_eq!(
        uvmm.mmio_exits("guest").unwrap(),
        before,
        "neither packets nor interrupts need uvmm"
    );
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn a_virtual_function_carries_data_without_the_help_of_uvmm_and_again_after_a_reboot() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    works(&uvmm, &mut vm);
    assert_ne!(vm.says("grep -c 'PCI-MSIX.*eth0' /proc/interrupts").unwrap(), "0");
    vm.serial.send("reboot -f").unwrap();
    vm.booted().unwrap();
    works(&uvmm, &mut vm);
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
        vm.exchanges(BULK / 2).unwrap();
    }
    assert_eq!(vm.errors().unwrap(), "");
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
    let _vm = holds(&uvmm);
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
    let _vm = holds(&uvmm);
    let (status, table) = examine(&text("VF0").unwrap());
    assert_eq!(status, 1, "{table}");
    assert!(table.contains("fuser /dev/vfio/"), "{table}");
}

/// A user without rights.
const NOBODY: u32 = 65534;

/// `uvmm` with `arguments` as that user, who may lock `memlock` MiB.
fn as_nobody(uvmm: &Uvmm, memlock: u64, arguments: &[&str]) -> Command {
    let given = uvmm.command(arguments.iter().copied());
    let mut command = Command::new("prlimit");
    command.arg(format!("--memlock={0}:{0}", memlock << 20)).arg("setpriv");
    command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]);
    command.args(["--clear-groups", "--inh-caps=-all"]).arg(given.get_program());
    let variables = given.get_envs().filter_map(|(name, value)| Some((name, value?)));
    command.args(given.get_args()).envs(variables).stdin(Stdio::null());
    command
}

/// What such a command says, on both streams, and its status.
fn heard(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn an_ordinary_user_is_told_what_is_missing_and_needs_no_more() {
    inside_lab!();
    // Where that user can run it.
    let place = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let binary = place.path().join("uvmm");
    fs::copy(variable("UVMM").unwrap(), &binary).unwrap();
    let uvmm = Uvmm::of(binary).unwrap();
    chown(uvmm.dir(), Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666)).unwrap();

    let function = text("VF0").unwrap();
    let group = format!("/sys/bus/pci/devices/{function}/iommu_group");
    let group = Path::new("/dev/vfio").join(fs::read_link(group).unwrap().file_name().unwrap());
    let device = format!("vfio,id=net0,host={function}");
    let run = ["run", "--name", "tiny", "--serial", "null", "--memory", "128M"];
    let run = [&run[..], &["--device", &device]].concat();
    let refused = |memlock: u64, why: &str, doctors: &str| {
        let (status, said) = heard(as_nobody(&uvmm, memlock, &run));
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
        let (status, table) = heard(as_nobody(&uvmm, memlock, &["doctor", "--device", &function]));
        assert_eq!(status, Some(1), "{table}");
        assert!(table.contains(doctors), "{table}");
    };
    refused(1024, "chown it to the user who runs uvmm", &format!("chown USER {}", group.display()));
    chown(&group, Some(NOBODY), None).unwrap();
    refused(64, "this process may lock 64 MiB, raise that (ulimit -l", "NO       at most 64M");
    let (status, table) = heard(as_nobody(&uvmm, 512, &["doctor", "--device", &function]));
    assert_eq!(status, Some(0), "{table}");

    let mut running = as_nobody(&uvmm, 128, &run).spawn().unwrap();
    let deadline = Instant::now() + SHORT;
    while heard(as_nobody(&uvmm, 128, &["info", "--vm", "tiny"])).0 != Some(0) {
        assert!(Instant::now() < deadline && matches!(running.try_wait(), Ok(None)));
    }
    let (status, said) = heard(as_nobody(&uvmm, 128, &["stop", "--force", "--vm", "tiny"]));
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(running.wait().unwrap().code(), Some(0));
    chown(&group, Some(0), None).unwrap();
}
