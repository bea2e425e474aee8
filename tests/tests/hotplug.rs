//! Virtual functions come and go while a stock Linux runs, by the button of their slot.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use serde_json::Value;
use tests::inside_lab;
use tests::network::GUEST_IP;
use tests::vm::{SHORT, Uvmm, Vm, text};

/// What comes and goes, each in a slot of its own, and of a card of its own: an emulated card that
/// resets one of its functions has been seen to deliver nothing to another.
const FUNCTIONS: [(&str, u8); 2] = [("VF0", 1), ("VF1", 2)];
/// How often each does, twenty times in all. Linux alone thinks for ten seconds each time, so that
/// they do it beside each other.
const CYCLES: usize = 10;
/// Bytes that each carries both ways when it has just come.
const BULK: usize = 2 << 20;

/// Boots a guest with empty slots.
fn boot(uvmm: &Uvmm, more: &str, arguments: &[&str]) -> Vm {
    let mut vm = uvmm.guest(more, arguments).unwrap();
    vm.says("insmod /modules/igbvf.ko").unwrap();
    vm
}

/// Joins the network of the lab by the function in `slot`, and reaches the other end.
fn pings(vm: &mut Vm, slot: u8) {
    vm.until(&format!("[ -d /sys/bus/pci/devices/0000:01:{slot:02x}.0/net/eth0 ]")).unwrap();
    vm.says("ip link set eth0 up && ip address add 10.7.0.3/24 dev eth0").unwrap();
    vm.until("grep -q 1 /sys/class/net/eth0/carrier").unwrap();
    vm.pings().unwrap();
}

fn plug(uvmm: &Uvmm, device: &str, more: &[&str]) -> (ExitStatus, String, String) {
    uvmm.call(&[&["plug", "--vm", "guest", "--device", device], more].concat()).unwrap()
}

fn unplug(uvmm: &Uvmm, id: &str, more: &[&str]) -> (ExitStatus, String, String) {
    uvmm.call(&[&["unplug", "--vm", "guest", id], more].concat()).unwrap()
}

/// How slot `number` stands.
fn slot(uvmm: &Uvmm, number: usize) -> Value {
    uvmm.info("guest").unwrap()["slots"][number - 1].take()
}

/// The files of VFIO that uvmm holds: the container or address space, the group, the device.
fn held(vm: &Vm) -> Vec<String> {
    let files = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
    let target = |file: fs::DirEntry| Some(fs::read_link(file.path()).ok()?.display().to_string());
    let targets = files.filter_map(|file| target(file.unwrap()));
    // KVM's list of its devices is there without any.
    let is_vfios = |target: &String| target.contains("vfio") || target == "/dev/iommu";
    targets.filter(is_vfios).filter(|target| target != "anon_inode:kvm-vfio").collect()
}

/// The files by which VFIO gives the function `address`: its group's, and its own if it has one.
fn files(address: &str) -> Vec<String> {
    let function = Path::new("/sys/bus/pci/devices").join(address);
    let group = fs::read_link(function.join("iommu_group")).unwrap();
    let own = fs::read_dir(function.join("vfio-dev")).into_iter().flatten();
    let own = own.map(|entry| Path::new("devices").join(entry.unwrap().file_name()));
    let files = own.chain(group.file_name().map(Into::into));
    files.map(|file| Path::new("/dev/vfio").join(file).display().to_string()).collect()
}

/// Nothing of the function `address` is left in uvmm, and it is still VFIO's.
fn is_the_hosts(vm: &Vm, address: &str) {
    assert_eq!(held(vm), [""; 0]);
    let driver = fs::read_link(format!("/sys/bus/pci/devices/{address}/driver")).unwrap();
    assert!(driver.ends_with("vfio-pci"), "{}", driver.display());
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let pinned = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    assert_eq!(pinned.trim(), "0 kB", "memory is still open to DMA");
}

/// The function that `name` names comes and goes in a slot of its own.
fn comes_and_goes(uvmm: &Uvmm, vm: &Mutex<Vm>, name: &str, number: u8) {
    let address = text(name).unwrap();
    let device = format!("vfio,id={name},host={address},slot={number}");
    let files = files(&address);
    let holds = |vm: &Vm| held(vm).iter().any(|file| files.contains(file));
    let slot = || slot(uvmm, number.into());
    for cycle in 0..CYCLES {
        let (status, printed, steps) = plug(uvmm, &device, &[]);
        assert!(status.success(), "{steps}");
        assert_eq!(printed, format!("{name} is in slot {number}\n"));
        assert!(steps.contains("asked") && steps.contains("accepted"), "{steps}");
        let is = slot();
        assert_eq!((&is["device"], &is["state"]), (&name.into(), &"enabled".into()), "{is}");
        assert_eq!((&is["power_led"], &is["attention_led"]), (&"on".into(), &"off".into()));
        {
            let mut vm = vm.lock().unwrap();
            assert!(holds(&vm));
            vm.joins_network_by(number, GUEST_IP).unwrap();
            if cycle == 0 {
                vm.exchanges(BULK).unwrap();
            }
        }
        let (status, printed, steps) = unplug(uvmm, name, &[]);
        assert!(status.success(), "{steps}");
        assert_eq!(printed, format!("{name} is out of slot {number}\n"));
        assert_eq!(slot()["state"], "disabled");
        let mut vm = vm.lock().unwrap();
        assert!(!holds(&vm));
        let place = format!("/sys/bus/pci/devices/0000:01:{number:02x}.0");
        vm.says(&format!("[ ! -e {place} ]")).unwrap();
    }
}

#[test]
fn functions_come_and_go_as_often_as_wished() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let vm = boot(&uvmm, "", &["--cpus", "2"]);
    assert_eq!(slot(&uvmm, 1)["device"], Value::Null);
    assert_eq!(slot(&uvmm, 1)["driver"], true);
    let vm = Mutex::new(vm);
    thread::scope(|scope| {
        for (name, slot) in FUNCTIONS {
            let (uvmm, vm) = (&uvmm, &vm);
            scope.spawn(move || comes_and_goes(uvmm, vm, name, slot));
        }
    });
    let vm = vm.into_inner().unwrap();
    for (name, _) in FUNCTIONS {
        is_the_hosts(&vm, &text(name).unwrap());
    }
    assert_eq!(vm.errors().unwrap(), "");
}

#[test]
fn two_functions_are_plugged_by_intx_and_survive_a_reboot() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "pci=nomsi", &[]);
    let (first, second) = (text("VF0").unwrap(), text("VF1").unwrap());
    let (status, _, errors) = plug(&uvmm, &format!("vfio,id=a,host={first},slot=4"), &[]);
    assert!(status.success(), "{errors}");
    let (status, _, errors) = plug(&uvmm, &format!("vfio,id=b,host={second}"), &[]);
    assert!(status.success(), "{errors}");
    for (device, reason) in [
        (format!("vfio,id=a,host={second}"), "the id a is in use"),
        (format!("vfio,id=c,host={second}"), "has 0000:01:10.1 already, as b"),
        ("vfio,id=c,host=0000:7f:00.0".to_owned(), "there is no device"),
        ("vfio,id=c,host=0000:7f:00.0,slot=4".to_owned(), "slot 4 is taken"),
        ("vfio,id=c,host=0000:7f:00.0,slot=5".to_owned(), "choose 1 to 4"),
    ] {
        let reason = reason.replace("0000:01:10.1", &second);
        let (status, _, errors) = plug(&uvmm, &device, &[]);
        assert_eq!(status.code(), Some(1), "{errors}");
        assert!(errors.contains(&reason) && errors.lines().count() == 1, "{errors}");
    }
    let (status, _, errors) = unplug(&uvmm, "c", &[]);
    assert!(!status.success() && errors.contains("it has a, b"), "{errors}");
    vm.serial.send("reboot -f").unwrap();
    vm.booted().unwrap();
    assert_eq!(vm.says("cat /sys/bus/pci/slots/*/power").unwrap(), "1 0 0 1");
    for id in ["a", "b"] {
        let (status, _, errors) = unplug(&uvmm, id, &[]);
        assert!(status.success(), "{errors}");
    }
    is_the_hosts(&vm, &first);
    is_the_hosts(&vm, &second);
}

#[test]
fn a_guest_that_does_not_answer_is_told_of_and_one_that_does_is_waited_for() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    // Linux waits for five seconds before it does what the button asks for.
    let (status, _, errors) = plug(&uvmm, &device, &["--timeout", "2s"]);
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("was not done in time"), "{errors}");
    is_the_hosts(&vm, &text("VF0").unwrap());
    vm.until("[ $(dmesg | grep -c 'shpchp.*cancel') -ge 1 ]").unwrap();
    vm.says("echo 0000:00:01.0 > /sys/bus/pci/drivers/shpchp/unbind").unwrap();
    assert_eq!(slot(&uvmm, 1)["driver"], false);
    let (status, _, errors) = plug(&uvmm, &device, &[]);
    assert!(!status.success() && errors.contains("does not listen"), "{errors}");
    vm.says("echo 0000:00:01.0 > /sys/bus/pci/drivers/shpchp/bind").unwrap();
    a_migration_waits_for_a_plugging(&uvmm, &device);
    pings(&mut vm, 1);
}

/// Plugs `device`, and tries meanwhile what has to wait.
fn a_migration_waits_for_a_plugging(uvmm: &Uvmm, device: &str) {
    let mut command = uvmm.command(["plug", "--vm", "guest", "--device", device]);
    let mut plugging = command.spawn().unwrap();
    // The main loop answers all along.
    let deadline = Instant::now() + SHORT;
    while slot(uvmm, 1)["power_led"] != "blink" {
        assert!(Instant::now() < deadline, "the guest does not blink");
    }
    let refused = |arguments: &[&str], reason: &str| {
        let (status, _, errors) = uvmm.call(arguments).unwrap();
        assert!(!status.success() && errors.contains(reason), "{errors}");
    };
    refused(&["migrate", "--vm", "guest", "--to", "127.0.0.1:1"], "wait until that is over");
    refused(&["unplug", "--vm", "guest", "net0"], "wait until that is over");
    assert!(plugging.wait().unwrap().success());
}
