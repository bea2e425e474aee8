//! A running Linux guest moves, and KVM's dirty rings tell what it writes meanwhile.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use tests::inside_lab;
use tests::vm::{Report, SHORT, Uvmm, Vm};

const TRIPS: usize = 3;
const RING: [&str; 2] = ["--dirty-tracking", "ring"];

/// A guest that rewrites and checks `mib` with `threads`, one for each of its vCPUs or less.
fn guest(uvmm: &Uvmm, mib: u32, threads: u32) -> Vm {
    let arguments = [&["--memory", "128M", "--cpus", "2"], RING.as_slice()].concat();
    uvmm.working_guest("host-0", &arguments, mib, threads).unwrap()
}

#[test]
fn a_guest_goes_from_ring_to_ring_and_every_page_is_what_it_was() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = guest(&uvmm, 4, 2);
    let mut checked = vm.pages_checked().unwrap();
    for trip in 1..=TRIPS {
        let (mut there, address) = uvmm.incoming_with(&format!("host-{trip}"), &RING).unwrap();
        let child = uvmm.begin_to_migrate(&vm, &address, &["--checksums"]).unwrap();
        let report = Report::of(child, SHORT).unwrap();
        assert_eq!(report.status, "completed", "{report:?} {}", vm.errors().unwrap());
        assert!(!there.errors().unwrap().contains("WARN"));
        assert!(!vm.errors().unwrap().contains("lost track"), "this KVM overran a ring");
        checked = there.works_on(checked).unwrap();
        println!("migration {trip}: {:.0} ms down, {} rounds", report.downtime_ms, report.rounds);
        std::mem::swap(&mut vm, &mut there);
    }
}

#[test]
fn the_vcpu_that_writes_is_slowed_down_and_the_other_runs_on() {
    inside_lab!();
    let uvmm = Uvmm::new().unwrap();
    let mut vm = guest(&uvmm, 16, 1);
    vm.says("for pid in $(ls /proc/$(pidof guest-load)/task); do taskset -p 2 $pid; done").unwrap();
    let wish = ["--downtime-limit", "50ms", "--on-no-convergence", "throttle"];
    // How fast it writes is up to the lab host.
    for limit in ["3M", "1M"] {
        let (there, address) = uvmm.incoming_with(&format!("host-{limit}"), &RING).unwrap();
        let more = [&["--bandwidth-limit", limit], wish.as_slice()].concat();
        let child = uvmm.begin_to_migrate(&vm, &address, &more).unwrap();
        let report = Report::of(child, SHORT * 3).unwrap();
        assert_eq!(report.status, "completed", "{report:?} {}", vm.errors().unwrap());
        vm = there;
        vm.works_on(0).unwrap();
        if let [other, writer] = report.throttled_vcpus[..] {
            println!(
                "at {limit} the writer was kept from running for {writer} %, the other {other} %"
            );
            return assert!(writer >= 20 && other < writer / 2, "{report:?}");
        }
    }
    panic!("it wrote too slowly to be slowed down");
}
