//! Guests that rewrite their memory as fast as they can while they move. Needs a usable
//! `/dev/kvm`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a machine can be run here at all.
fn usable() -> bool {
    let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        println!("skipped: /dev/kvm cannot be used");
    }
    usable
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

struct Host(tempfile::TempDir);

impl Host {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_uvmm")));
        command.args(arguments).stdin(Stdio::null());
        command.env("UVMM_RUNTIME_DIR", self.0.path().join("run"));
        command.env("UVMM_STATE_DIR", self.0.path().join("state"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn uvmm(&self, arguments: &[&str]) -> (bool, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        (status.success(), String::from_utf8([stdout, stderr].concat()).unwrap())
    }

    fn run(&self, name: &str, arguments: &[&str]) -> Vm {
        let console = self.0.path().join(format!("{name}.console"));
        let serial = format!("socket={}", console.display());
        let all = [&["run", "--name", name, "--serial", &serial], arguments].concat();
        let vm = Vm { process: self.command(&all).spawn().unwrap(), console };
        until("the VM answers", || self.uvmm(&["info", "--vm", name]).0);
        vm
    }

    /// A guest that rewrites `mib` MiB, and knows what each page should hold.
    fn busy(&self, memory: &str, percent: u32, mib: u32, more: &[&str]) -> Vm {
        let told = format!("run=fill 7 {percent};rewrite {mib} max");
        let arguments = [&["--memory", memory, "--cmdline", &told], more].concat();
        let vm = self.run("web", &arguments);
        vm.converse("", &["rewrite ok"]);
        vm
    }

    fn incoming(&self) -> (Vm, String) {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        (self.run("other", &["--incoming", &format!("tcp:{address}")]), address)
    }

    /// Migrates, and gives the report.
    fn migrate(&self, to: &str, arguments: &[&str]) -> serde_json::Value {
        let all = [&["migrate", "--vm", "web", "--json", "--to", to], arguments].concat();
        let Output { stdout, stderr, .. } = self.command(&all).output().unwrap();
        let complaint = String::from_utf8_lossy(&stderr);
        serde_json::from_slice(&stdout).unwrap_or_else(|_| panic!("no report: {complaint}"))
    }
}

struct Vm {
    process: Child,
    console: PathBuf,
}

impl Vm {
    /// Says `words` on the console and reads until the guest gives one of `answers`: gives all it said.
    fn converse(&self, words: &str, answers: &[&str]) -> String {
        let mut console = UnixStream::connect(&self.console).unwrap();
        console.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(console, "{words}").unwrap();
        let (mut said, mut some) = (String::new(), [0; 4096]);
        let start = Instant::now();
        while !answers.iter().any(|answer| said.contains(answer)) {
            let count = console.read(&mut some).unwrap_or_else(|error| panic!("{error}: {said:?}"));
            said.push_str(&String::from_utf8_lossy(&some[..count]));
            assert!(count > 0 && start.elapsed() < PATIENCE, "{said}");
        }
        said
    }

    /// Asserts that every page holds what the guest wrote last.
    fn assert_whole(&self) {
        let said = self.converse("verify", &["verify ok", "verify FAILED"]);
        assert!(said.contains("verify ok"), "{said}");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _status = self.process.wait();
    }
}

#[test]
fn a_guest_that_rewrites_memory_all_the_time_arrives_whole() {
    if !usable() {
        return;
    }
    for (tracking, streams) in [("log", "1"), ("log", "3"), ("ring", "2")] {
        let host = Host(tempfile::tempdir().unwrap());
        let _source = host.busy("64M", 60, 16, &["--dirty-tracking", tracking]);
        let (destination, to) = host.incoming();
        let line = ["--downtime-limit", "1ms", "--bandwidth-limit", "60M", "--streams", streams];
        let report = host.migrate(&to, &line);
        assert_eq!(report["status"], "completed", "{report}");
        assert!(report["rounds"].as_u64().unwrap() > 3, "{report}");
        destination.assert_whole();
    }
}

/// What a connection may carry: less than a guest writes, even if this machine has other work.
const SLOW: [&str; 2] = ["30M", "10M"];

/// To move within a downtime that needs a guest to be slowed down.
fn over<'a>(bandwidth: &'a str, wish: &'a str) -> [&'a str; 6] {
    ["--downtime-limit", "3ms", "--on-no-convergence", wish, "--bandwidth-limit", bandwidth]
}

#[test]
fn a_guest_that_writes_too_fast_stays_if_so_wished() {
    if !usable() {
        return;
    }
    assert!(SLOW.into_iter().any(stays), "it wrote no faster than it was sent");
}

/// Whether it came to that.
fn stays(bandwidth: &str) -> bool {
    let host = Host(tempfile::tempdir().unwrap());
    let source = host.busy("64M", 60, 16, &[]);
    let (_destination, to) = host.incoming();
    let report = host.migrate(&to, &over(bandwidth, "fail"));
    if report["outcome"] == "converged" {
        return false;
    }
    assert_eq!((&report["status"], &report["outcome"]), (&"failed".into(), &"gave-up".into()));
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("--on-no-convergence throttle"), "{error}");
    source.assert_whole();
    true
}

/// The report of a guest with `arguments` that was slowed down, and arrived whole.
fn slowed_down(arguments: &[&str]) -> serde_json::Value {
    for bandwidth in SLOW {
        let host = Host(tempfile::tempdir().unwrap());
        let _source = host.busy("64M", 60, 16, arguments);
        let (destination, to) = host.incoming();
        let report = host.migrate(&to, &over(bandwidth, "throttle"));
        assert_eq!(report["status"], "completed", "{report}");
        destination.assert_whole();
        if report["outcome"] == "throttled" {
            assert!(report["throttled_percent"].as_u64().unwrap() >= 20, "{report}");
            return report;
        }
    }
    panic!("it was never slowed down");
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_if_so_wished() {
    if !usable() {
        return;
    }
    let report = slowed_down(&[]);
    assert!(report["throttled_vcpus"].as_array().unwrap().is_empty(), "{report}");
}

#[test]
fn the_vcpu_that_writes_is_slowed_down_and_the_others_are_not() {
    if !usable() {
        return;
    }
    let report = slowed_down(&["--cpus", "3", "--dirty-tracking", "ring"]);
    let share = &report["throttled_percent"];
    assert_eq!(report["throttled_vcpus"], serde_json::json!([share, 0, 0]));
}

#[test]
fn a_cancelled_migration_leaves_a_dirty_log_behind_that_the_next_can_use() {
    if !usable() {
        return;
    }
    ["log", "ring"].into_iter().for_each(cancelled_and_moved);
}

fn cancelled_and_moved(tracking: &str) {
    let host = Host(tempfile::tempdir().unwrap());
    let source = host.busy("64M", 60, 8, &["--dirty-tracking", tracking]);
    let (destination, to) = host.incoming();
    let line = ["migrate", "--vm", "web", "--json", "--bandwidth-limit", "20M", "--to", &to];
    let child = host.command(&line).spawn().unwrap();
    until("memory moves", || host.uvmm(&["info", "--vm", "web", "--json"]).1.contains("copying"));
    thread::sleep(Duration::from_millis(300));
    assert!(host.uvmm(&["cancel", "--vm", "web"]).0);
    let cancelled = child.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&cancelled.stdout).contains("\"cancelled\""));
    source.assert_whole();
    drop(destination);
    let (destination, to) = host.incoming();
    let report = host.migrate(&to, &[]);
    assert_eq!(report["status"], "completed", "{report}");
    destination.assert_whole();
}
