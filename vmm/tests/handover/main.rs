//! Processes that are killed in the one moment of a migration that matters, and guests that go
//! other ways. Needs a usable `/dev/kvm`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod shared_memory;
mod snapshot;
mod typing;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What [`migration::wire::Message`] begins with on the wire.
const COMMIT: u8 = 7;
const RUNNING: u8 = 8;
const DONE: u8 = 9;

/// Whether a machine can be run here at all.
fn usable() -> bool {
    let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        println!("skipped: /dev/kvm cannot be used");
    }
    usable
}

/// A network between two hosts that holds one message back.
struct Proxy {
    address: SocketAddr,
    /// Whether new connections come through.
    open: Arc<AtomicBool>,
    held: Receiver<()>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn holding(message: u8, to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (open, connections) = (Arc::new(AtomicBool::new(true)), Arc::default());
        let (holds, held) = channel();
        let proxy = Self { address, open: open.clone(), held, connections };
        let kept = proxy.connections.clone();
        let serve = move || {
            for (number, near) in listener.incoming().enumerate() {
                let near = near.unwrap();
                let Ok(far) = TcpStream::connect(to) else { continue };
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                let first = (number == 0).then_some(message);
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let holds = holds.clone();
                    thread::Builder::new().spawn(move || pass(from, &to, first, &holds)).unwrap();
                }
                kept.lock().unwrap().extend([near, far]);
            }
        };
        thread::Builder::new().spawn(serve).unwrap();
        proxy
    }

    fn wait(&self) {
        self.held.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    /// Ends the connection that was held, and lets others come through.
    fn cut(&self) {
        for stream in self.connections.lock().unwrap().drain(..) {
            let _closed = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Passes bytes on until `held` would pass: then tells so, and swallows the rest.
fn pass(mut from: TcpStream, mut to: &TcpStream, held: Option<u8>, holds: &Sender<()>) {
    let mut bytes = vec![0; 1 << 16];
    let mut holding = false;
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        // A frame with a message of 17 bytes: its number, and a token.
        let starts = |message| [1, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, message];
        if held.is_some_and(|message| bytes[..count].starts_with(&starts(message))) {
            holding = true;
            let _told = holds.send(());
        }
        if !holding && to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    if !holding {
        let _closed = to.shutdown(Shutdown::Write);
    }
}

/// One host: its own VMs and decisions.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_uvmm")));
        command.args(line.split_whitespace()).stdin(Stdio::null());
        command.env("UVMM_RUNTIME_DIR", self.0.path().join("run"));
        command.env("UVMM_STATE_DIR", self.0.path().join("state"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn uvmm(&self, line: &str) -> (bool, String) {
        let Output { status, stdout, stderr } = self.command(line).output().unwrap();
        (status.success(), String::from_utf8([stdout, stderr].concat()).unwrap())
    }

    /// Starts a VM and waits until it answers.
    fn run(&self, arguments: &str) -> Vm {
        let line = format!("run --name web --serial null {arguments}");
        self.start(self.command(&line), "web")
    }

    /// Starts the VM called `name` by `command`, and waits until it answers.
    fn start(&self, mut command: Command, name: &str) -> Vm {
        let vm = Vm(command.spawn().unwrap());
        let start = Instant::now();
        while !self.uvmm(&format!("info --vm {name}")).0 {
            assert!(start.elapsed() < Duration::from_secs(20), "{}", vm.said());
            thread::sleep(Duration::from_millis(20));
        }
        vm
    }

    /// Whether nothing is left to be decided: a destination forgets once DONE has come.
    fn has_forgotten(&self) -> bool {
        let start = Instant::now();
        while self.decisions() > 0 && start.elapsed() < Duration::from_secs(5) {
            thread::sleep(Duration::from_millis(20));
        }
        self.decisions() == 0
    }

    fn decisions(&self) -> usize {
        std::fs::read_dir(self.0.path().join("state")).map_or(0, Iterator::count)
    }
}

struct Vm(Child);

impl Vm {
    /// As if its host had lost it.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn ended(mut self) -> Option<i32> {
        self.wait()
    }

    /// What it says against running at all.
    fn refused(mut self) -> String {
        assert_eq!(self.wait(), Some(1));
        self.said()
    }

    fn wait(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(30), "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn said(mut self) -> String {
        self.0.kill().unwrap();
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A guest on its way, its network at the point where it holds `message`.
struct Scene {
    home: Host,
    away: Host,
    incoming: String,
    source: Vm,
    destination: Vm,
    proxy: Proxy,
    migrate: Child,
}

fn stopped_at(message: u8) -> Scene {
    stopped_at_of(message, "")
}

/// The same, with `more` on the command line of the migration.
fn stopped_at_of(message: u8, more: &str) -> Scene {
    stopped(message, more, |home| home.run("--memory 64M"), "web")
}

/// The same, of the guest called `name` that `boot` starts.
fn stopped(message: u8, more: &str, boot: impl FnOnce(&Host) -> Vm, name: &str) -> Scene {
    let (home, away) = (Host::new(), Host::new());
    let at = free_port();
    let incoming = format!("--incoming tcp:{at}");
    let destination = away.run(&incoming);
    let source = boot(&home);
    let proxy = Proxy::holding(message, at);
    let line = format!("migrate --vm {name} --to {} --json {more}", proxy.address);
    let migrate = home.command(&line).spawn().unwrap();
    proxy.wait();
    Scene { home, away, incoming, source, destination, proxy, migrate }
}

fn status(migrate: Child) -> String {
    let Output { stdout, .. } = migrate.wait_with_output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&stdout).unwrap();
    report["status"].as_str().unwrap().to_owned()
}

fn is_running(host: &Host) -> bool {
    host.uvmm("info --vm web --json").1.contains("\"running\"")
}

/// A guest runs a moment before its source can know.
fn comes_to_run(host: &Host) -> bool {
    (0..100).any(|_| {
        let runs = is_running(host);
        if !runs {
            thread::sleep(Duration::from_millis(50));
        }
        runs
    })
}

#[test]
fn whoever_heard_that_a_guest_arrived_finds_it_running_there() {
    if !usable() {
        return;
    }
    // The destination still waits to hear that its word came.
    let scene = stopped_at(DONE);
    assert_eq!(status(scene.migrate), "completed");
    let (answered, info) = scene.away.uvmm("info --vm web --json");
    assert!(answered && info.contains("\"running\""), "{info}");
    assert!(scene.away.uvmm("pause --vm web").0);
}

#[test]
fn a_destination_killed_before_commit_gives_the_guest_back_when_it_is_restarted() {
    if !usable() {
        return;
    }
    let scene = stopped_at(COMMIT);
    scene.destination.kill();
    assert_eq!(scene.away.decisions(), 1, "it was ready, and wrote that down");
    let _again = scene.away.run(&scene.incoming);
    scene.proxy.cut();
    assert_eq!(status(scene.migrate), "failed");
    assert!(comes_to_run(&scene.home));
    assert!(!is_running(&scene.away));
    assert!(scene.home.has_forgotten() && scene.away.has_forgotten());
    drop(scene.source);
}

#[test]
fn a_destination_killed_after_commit_still_has_the_guest_when_it_is_restarted() {
    if !usable() {
        return;
    }
    let scene = stopped_at(RUNNING);
    scene.destination.kill();
    let _again = scene.away.run(&scene.incoming);
    scene.proxy.cut();
    assert_eq!(status(scene.migrate), "completed", "the guest ran there, and died there");
    assert_eq!(scene.source.ended(), Some(0));
    assert!(scene.home.has_forgotten() && scene.away.has_forgotten());
}

#[test]
fn a_guest_whose_source_was_killed_after_commit_is_not_booted_before_it_was_asked_for() {
    if !usable() {
        return;
    }
    let scene = stopped_at(COMMIT);
    scene.source.kill();
    let (home, away) = (scene.home, scene.away);
    assert_eq!(status(scene.migrate), "undecided");

    let (began, error) = home.uvmm("run --name web --serial null --memory 64M");
    assert!(!began && error.contains("may run there"), "{error}");
    let (shown, page) = home.uvmm("resolve");
    assert!(shown && page.contains(&scene.proxy.address.to_string()), "{page}");
    let (_, error) = home.uvmm("resolve --run-here --yes");
    assert!(error.contains("its memory with it"), "{error}");
    let (_, error) = home.uvmm("resolve --forget");
    assert!(error.contains("makes two"), "{error}");
    assert_eq!(home.decisions(), 1);

    let (asked, answer) = home.uvmm("resolve --ask");
    assert!(asked && answer.contains("never will"), "{answer}");
    scene.proxy.cut();
    assert_eq!(scene.destination.ended(), Some(1), "it lost the guest that it was ready for");
    assert!(home.has_forgotten() && away.has_forgotten());
    let _again = home.run("--memory 64M");
    assert!(comes_to_run(&home));
}

#[test]
fn a_guest_that_was_given_no_name_is_not_booted_a_second_time_either() {
    if !usable() {
        return;
    }
    let line = "run --serial null --memory 64M";
    let scene = stopped(COMMIT, "", |home| home.start(home.command(line), "vm0"), "vm0");
    scene.source.kill();
    assert_eq!(status(scene.migrate), "undecided");
    let error = Vm(scene.home.command(line).spawn().unwrap()).refused();
    assert!(error.contains("vm0 was given away"), "{error}");
    assert!(error.contains("choose another name"), "{error}");
    let _other = scene.home.run("--memory 64M");
}

#[test]
fn both_ends_of_a_migration_can_share_a_host() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let at = free_port();
    let source = host.run("--memory 64M");
    let line = format!("run --name other --serial null --incoming tcp:{at}");
    let destination = Vm(host.command(&line).spawn().unwrap());
    while !host.uvmm("info --vm other").0 {
        thread::sleep(Duration::from_millis(20));
    }
    let (moved, report) = host.uvmm(&format!("migrate --vm web --to {at} --json"));
    assert!(moved, "{report}");
    assert_eq!(source.ended(), Some(0));
    assert!(host.has_forgotten());
    drop(destination);
}

#[test]
fn a_guest_keeps_its_processors_wherever_it_goes() {
    if !usable() {
        return;
    }
    let hosts = [Host::new(), Host::new(), Host::new()];
    if gives_no_v2(&hosts[0]) {
        println!("skipped: this host does not give x86-64-v2");
        return;
    }
    let file = hosts[0].0.path().join("pool.toml");
    std::fs::write(&file, "base = 'x86-64-v2'\nremove = ['ssse3']\n").unwrap();
    for (cpu, named) in [("x86-64-v2", "x86-64-v2"), (file.to_str().unwrap(), "x86-64-v2-ssse3")] {
        let mut vms = vec![hosts[0].run(&format!("--memory 64M --cpu {cpu}"))];
        for pair in hosts.windows(2) {
            let at = free_port();
            let destination = pair[1].run(&format!("--incoming tcp:{at}"));
            let (moved, report) = pair[0].uvmm(&format!("migrate --vm web --to {at} --json"));
            assert!(moved, "{report}");
            assert!(comes_to_run(&pair[1]));
            let info: serde_json::Value =
                serde_json::from_str(&pair[1].uvmm("info --vm web --json").1).unwrap();
            assert_eq!(info["cpu"], named);
            vms.push(destination);
        }
    }
}

fn gives_no_v2(host: &Host) -> bool {
    let findings: serde_json::Value = serde_json::from_str(&host.uvmm("doctor --json").1).unwrap();
    let checks = findings["checks"].as_array().unwrap();
    let level = checks.iter().find(|check| check["what"] == "processors x86-64-v2").unwrap();
    level["verdict"] == "missing"
}

#[test]
fn processors_that_a_host_has_not_are_refused_with_a_list() {
    if !usable() {
        return;
    }
    let host = Host::new();
    // AMD's for Intel's and the other way round: no processor has both.
    let file = host.0.path().join("all.toml");
    std::fs::write(&file, "base = 'host'\nadd = ['enqcmd', 'tbm']\n").unwrap();
    let line = format!("run --serial null --memory 64M --cpu {}", file.to_str().unwrap());
    let (began, error) = host.uvmm(&line);
    assert!(!began && error.contains("lacks enqcmd, tbm"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn an_undecided_guest_is_decided_by_asking_again() {
    if !usable() {
        return;
    }
    let scene = stopped_at_of(COMMIT, "--undecided-after 2s");
    scene.proxy.open.store(false, Ordering::SeqCst);
    assert_eq!(status(scene.migrate), "undecided");
    let (_, page) = scene.home.uvmm("resolve");
    assert!(page.contains("uvmm resolve --vm web --ask"), "{page}");
    scene.proxy.open.store(true, Ordering::SeqCst);
    let (asked, answer) = scene.home.uvmm("resolve --ask");
    assert!(asked && answer.contains("it goes on here"), "{answer}");
    assert!(comes_to_run(&scene.home));
    assert!(scene.home.has_forgotten());
    drop((scene.source, scene.destination));
}
