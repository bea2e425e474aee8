//! What a device writes into a guest's memory while the guest moves arrives with it, because the
//! guest driver keeps its promise; and would not if it did not.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use tests::inside_lab;
use tests::network::{Alias, Relay};
use tests::program;
use tests::vm::{Report, Uvmm, Vm, text};

/// Bytes of a segment. The card writes each into a buffer that has been waiting for it since
/// before the migration.
const SEGMENT: usize = 1000;
/// How many there are, each on a connection of its own: where one follows another that was not
/// read yet, Linux writes beside it when it puts both together.
const SEGMENTS: usize = 20;
const EVERY: Duration = Duration::from_millis(100);
/// With this much that is written again and again, no faster than this and to be stopped for so
/// short a time, memory is sent more than once.
const BUSY: &str = "guest-load 64 1 /run/load > /dev/null &";
const PASSES: [&str; 4] = ["--bandwidth-limit", "32M", "--downtime-limit", "30ms"];

/// Boots a guest with `VF0`, and the guest driver with `parameters`.
fn boot(uvmm: &Uvmm, more: &str, parameters: &str) -> Vm {
    let device = format!("vfio,id=net0,host={}", text("VF0").unwrap());
    let mut vm = uvmm.guest(more, &["--device", &device]).unwrap();
    vm.joins_network_after(&format!("insmod /modules/uvmm_bridge.ko {parameters} &&")).unwrap();
    vm
}

/// Programs of the guest that are connected to here, and read nothing until they are told to go on.
fn stopped_readers(vm: &mut Vm) -> Vec<TcpStream> {
    let peer = text("PEER_IP").unwrap();
    let listener = TcpListener::bind((&*peer, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let line = format!("for i in $(seq {SEGMENTS}); do nc {peer} {port} > /tmp/got.$i & done");
    vm.says(&line).unwrap();
    let streams = (0..SEGMENTS).map(|_| listener.accept().unwrap().0).collect();
    vm.says("kill -STOP $(pidof nc)").unwrap();
    vm.says(BUSY).unwrap();
    streams
}

/// Sends a random segment to each; gives the sums of all, in order.
fn trickle(streams: &mut [TcpStream]) -> String {
    let mut random = File::open("/dev/urandom").unwrap();
    let mut sums = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("segment");
    for stream in streams {
        let mut segment = [0; SEGMENT];
        random.read_exact(&mut segment).unwrap();
        stream.write_all(&segment).unwrap();
        fs::write(&path, segment).unwrap();
        let sum = program::run(Command::new("md5sum").arg(&path)).unwrap();
        sums.push(sum.split_whitespace().next().unwrap().to_owned());
        thread::sleep(EVERY);
    }
    sums.sort();
    sums.join(" ")
}

/// Lets all memory pass, and with it the buffers for the segments; gives the pass that is held up.
fn hold_after_all_was_sent_once(uvmm: &Uvmm, relay: &Relay) -> u32 {
    uvmm.until_it_copies("guest").unwrap();
    // The destination says so of each pass that it has.
    relay.hold_at_answer();
    uvmm.until("guest", |_| relay.holds()).unwrap();
    let info = uvmm.info("guest").unwrap();
    info["migration"]["round"].as_u64().unwrap().try_into().unwrap()
}

/// Moves a guest while segments arrive that nobody in it reads; the sums of what was sent and of
/// what it reads afterwards.
fn sums(more: &str, parameters: &str) -> (String, String) {
    let uvmm = Uvmm::new().unwrap();
    let _alias = Alias::give("PF1", 0).unwrap();
    let mut from = boot(&uvmm, more, parameters);
    let mut streams = stopped_readers(&mut from);
    let device = format!("vfio,id=net0,host={}", text("VF1").unwrap());
    let (mut vm, address) = uvmm.incoming_with("there", &["--device", &device]).unwrap();
    let relay = Relay::to(&address).unwrap();
    let child = uvmm.begin_to_migrate(&from, &relay.address(), &PASSES).unwrap();
    let pass = hold_after_all_was_sent_once(&uvmm, &relay);
    let sent = trickle(&mut streams);
    from.says("kill $(pidof guest-load)").unwrap();
    relay.release();
    let report = Report::of(child, Duration::from_secs(120)).unwrap();
    assert_eq!(report.status, "completed", "{report:?}\n{}", from.errors().unwrap());
    assert_eq!(report.devices[0].strategy, "pause", "{report:?}");
    assert!(report.rounds > pass, "segments during pass {pass} of {report:?}");
    drop(streams);
    assert_eq!(vm.says("cat /tmp/got.* | wc -c").unwrap(), "0", "nobody read anything so far");
    vm.says("kill -CONT $(pidof nc)").unwrap();
    vm.until("! pidof nc > /dev/null").unwrap();
    let bytes = vm.says("cat /tmp/got.* | wc -c").unwrap();
    assert_eq!(bytes, (SEGMENTS * SEGMENT).to_string(), "right or wrong, they are all there");
    (sent, vm.says("md5sum /tmp/got.* | cut -d' ' -f1 | sort").unwrap())
}

#[test]
fn what_a_device_writes_arrives_by_the_driver_s_own_operations() {
    inside_lab!();
    let (sent, arrived) = sums("", "");
    assert_eq!(sent, arrived);
}

#[test]
fn what_a_device_writes_arrives_where_the_guest_bounces() {
    inside_lab!();
    let (sent, arrived) = sums("swiotlb=force", "");
    assert_eq!(sent, arrived);
}

#[test]
fn what_a_device_writes_is_lost_if_the_promise_is_broken() {
    inside_lab!();
    let (sent, arrived) = sums("", "break_promise=1");
    assert_ne!(sent, arrived, "then the other tests here prove nothing");
}
