//! A Linux guest that owns a virtual function moves, and has another one where it arrives.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm, text};

/// `--device` for the lab's virtual function that `variable` names.
fn device(id: &str, variable: &str) -> String {
    format!("vfio,id={id},host={}", text(variable).unwrap())
}

/// Boots a guest that has `VF0` in its first slot, and joins the network.
fn networked(uvmm: &Uvmm, more: &str) -> Vm {
    let mut vm = uvmm.guest(more, &["--device", &device("net0", "VF0")]).unwrap();
    vm.says("insmod /modules/igbvf.ko").unwrap();
    join_network(&mut vm);
    vm
}

/// Gives the guest's one function an address, and reaches the lab host by it.
fn join_network(vm: &mut Vm) {
    vm.until("[ -d /sys/class/net/eth0 ]").unwrap();
    vm.says("ip link set eth0 up && ip address add 10.7.0.2/24 dev eth0").unwrap();
    vm.until("grep -q 1 /sys/class/net/eth0/carrier").unwrap();
    pings(vm);
}

fn pings(vm: &mut Vm) {
    let said = vm.says(&format!("ping -c 5 -i 0.2 -W 5 {}", text("PEER_IP").unwrap())).unwrap();
    assert!(said.contains(" 0% packet loss"), "{said}");
}

/// Moves the guest; the old process must have ended well.
fn move_on(uvmm: &Uvmm, mut from: Vm, to: &str, device: &str) -> (Vm, Report) {
    let (vm, address) = uvmm.incoming_with(to, &["--device", device]).unwrap();
    let report = uvmm.migrate(&from, &address).unwrap();
    assert_eq!(report.status, "completed", "{report:?}\n{}", vm.errors().unwrap());
    assert_eq!(from.wait(SHORT).unwrap().code(), Some(0), "{}", from.errors().unwrap());
    (vm, report)
}

#[test]
fn a_stock_guest_lets_go_of_its_function_and_is_given_another() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let vm = networked(&uvmm, "");
    let (mut vm, report) = move_on(&uvmm, vm, "there", &device("net0", "VF1"));
    println!("{report:?}");
    join_network(&mut vm);
    let (mut vm, _) = move_on(&uvmm, vm, "back", &device("net0", "VF0"));
    join_network(&mut vm);
    assert_eq!(vm.errors().unwrap(), "");
}
