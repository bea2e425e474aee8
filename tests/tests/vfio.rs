//! A stock Linux drives a virtual function of the host's NIC behind the hot-plug bridge.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use tests::inside_lab;
use tests::vm::{CMDLINE, Uvmm, Vm, variable};

/// Bytes that are carried each way.
const BULK: usize = 8 << 20;

fn text(name: &str) -> String {
    variable(name).unwrap().into_string().unwrap()
}

/// Boots with the virtual function `VF0`, and more on the command line.
fn boot(uvmm: &Uvmm, more: &str, arguments: &[&str]) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0"));
    let mut all = vec!["--kernel".into(), variable("GUEST_KERNEL").unwrap()];
    all.extend(["--initrd".into(), variable("GUEST_INITRD").unwrap()]);
    all.extend(["--cmdline".into(), format!("{CMDLINE} {more}").into()]);
    all.extend(["--memory", "256M", "--device", &device].iter().chain(arguments).map(Into::into));
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

/// Loads the driver, if it is not there, and joins the network of the lab.
fn join_network(vm: &mut Vm) {
    says(vm, "[ -d /sys/module/igbvf ] || insmod /modules/igbvf.ko");
    says(
        vm,
        "n=0; until [ -d /sys/bus/pci/devices/0000:01:01.0/net ]; do sleep 0.1; n=$((n + 1)); [ $n -lt 100 ] || break; done",
    );
    says(vm, "ip link set eth0 up && ip address add 10.7.0.2/24 dev eth0");
    says(
        vm,
        "n=0; until grep -q 1 /sys/class/net/eth0/carrier; do sleep 0.1; n=$((n + 1)); [ $n -lt 100 ] || break; done",
    );
    pings(vm);
}

fn pings(vm: &mut Vm) {
    let said = says(vm, &format!("ping -c 5 -i 0.2 -W 5 {}", text("PEER_IP")));
    assert!(said.contains(" 0% packet loss"), "{said}");
}

/// How many accesses uvmm had to answer for the guest so far.
fn exits(uvmm: &Uvmm) -> (u64, u64) {
    let (status, info, errors) = uvmm.call(&["info", "--vm", "guest", "--json"]).unwrap();
    assert!(status.success(), "{errors}");
    let number = |name: &str| {
        let (_, rest) = info.split_once(&format!("\"{name}\":")).unwrap();
        let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    (number("exits-mmio"), number("exits-pio"))
}

/// Carries data both ways and compares what arrived.
fn carries(vm: &mut Vm) {
    let listener = TcpListener::bind((text("PEER_IP").as_str(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = vec![0; BULK];
        stream.read_exact(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        drop(stream.read_to_end(&mut Vec::new()));
    });
    let peer = text("PEER_IP");
    let line = format!(
        "head -c {BULK} /dev/urandom > /tmp/sent; nc {peer} {port} < /tmp/sent > /tmp/back; \
         cmp /tmp/sent /tmp/back && wc -c < /tmp/back"
    );
    assert_eq!(says(vm, &line), BULK.to_string());
    echo.join().unwrap();
}

#[test]
fn a_virtual_function_carries_data_without_the_help_of_uvmm() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = boot(&uvmm, "", &[]);
    assert_eq!(says(&mut vm, "cat /sys/bus/pci/slots/1/adapter /sys/bus/pci/slots/1/power"), "1 1");
    join_network(&mut vm);
    let interrupts = "grep -c PCI-MSIX.*eth0 /proc/interrupts";
    assert_ne!(says(&mut vm, interrupts), "0");
    let before = exits(&uvmm);
    carries(&mut vm);
    let after = exits(&uvmm);
    println!("exits: {before:?} {after:?}");
    assert_eq!(vm.errors().unwrap(), "");
}
