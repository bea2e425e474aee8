//! Client and server against each other, with a VM that exists only here.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use migration::wire::Compression;

use super::*;
use crate::config::{SerialMode, VmName};

/// A VM that answers and does nothing else, until it is dropped.
struct FakeVm {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
    name: VmName,
}

fn info(name: &VmName, state: State) -> Info {
    Info {
        name: name.clone(),
        state,
        cpus: 1,
        cpu: "host".into(),
        memory: 1 << 30,
        pid: std::process::id(),
        uptime_ms: 1,
        serial: SerialMode::Null,
        incoming: None,
        migration: None,
        slots: Vec::new(),
        counters: [("exits".to_owned(), 7)].into(),
    }
}

impl FakeVm {
    fn start(dir: &RuntimeDir, state: State) -> Self {
        let claim = dir.claim(None).unwrap();
        let (name, stop) = (claim.name().clone(), Arc::new(AtomicBool::new(false)));
        let (own_name, own_stop) = (name.clone(), stop.clone());
        let mut kept = Vec::new();
        let answer = move |Call { request, mut reply }: Call| match request {
            Request::Info {} => reply.finish(Ok(info(&own_name, state))),
            Request::Pause {} => reply.finish::<()>(Err("it is migrating".into())),
            Request::Cancel {} => {
                reply.progress(&Progress::default());
                kept.push(reply);
            }
            Request::Stop { .. } => drop(reply),
            Request::Migrate(_) => {
                for round in 0..10_000 {
                    reply.progress(&Progress { round, ..Progress::default() });
                }
                reply.finish(Ok(MigrationReport::not_started(longest_error())));
            }
            _ => reply.finish(Ok(())),
        };
        let server = Server::new(&claim, answer).unwrap();
        let run = move || {
            let mut events = EventManager::<Server>::new().unwrap();
            events.add_subscriber(server);
            while !own_stop.load(Ordering::Relaxed) {
                events.run_with_timeout(5).unwrap();
            }
            drop(claim);
        };
        let thread = Some(thread::Builder::new().spawn(run).unwrap());
        FakeVm { stop, thread, name }
    }
}

/// The longest that a migration may end with, each character of which takes two on the socket.
fn longest_error() -> String {
    "\"".repeat(12 << 10)
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn runtime_dir() -> (tempfile::TempDir, RuntimeDir) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = RuntimeDir::at(temporary.path().join("uvmm")).unwrap();
    (temporary, dir)
}

fn connect(dir: &RuntimeDir) -> Client {
    Client::connect(dir, None).unwrap()
}

#[test]
fn a_request_is_answered_with_a_result_or_with_the_vms_own_reason() {
    let (_temporary, dir) = runtime_dir();
    let vm = FakeVm::start(&dir, State::Running);
    let answer: Info = connect(&dir).ask(&Request::Info {}).unwrap();
    assert_eq!(answer, info(&vm.name, State::Running));
    connect(&dir).ask::<()>(&Request::Resume {}).unwrap();
    let refused = connect(&dir).ask::<()>(&Request::Pause {}).unwrap_err();
    assert_eq!(refused.to_string(), "vm0: it is migrating");
}

#[test]
fn a_call_that_is_lost_is_not_waited_for() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    let lost = connect(&dir).ask::<()>(&Request::Stop { force: true }).unwrap_err();
    assert!(matches!(lost, ClientError::Closed { .. }), "{lost}");
}

#[test]
fn without_a_name_the_only_vm_with_a_guest_is_meant() {
    let (_temporary, dir) = runtime_dir();
    assert!(matches!(Client::connect(&dir, None), Err(ClientError::NoneRunning)));
    let _first = FakeVm::start(&dir, State::Running);
    assert_eq!(connect(&dir).name().as_str(), "vm0");
    let _waits = FakeVm::start(&dir, State::Incoming);
    assert_eq!(connect(&dir).name().as_str(), "vm0");
    let _second = FakeVm::start(&dir, State::Paused);
    let several = Client::connect(&dir, None).unwrap_err().to_string();
    assert!(several.ends_with("(vm0, vm1, vm2)"), "{several}");
    let named = Client::connect(&dir, Some(&"vm9".parse().unwrap())).unwrap_err().to_string();
    assert!(named.ends_with("running are vm0, vm1, vm2"), "{named}");
}

#[test]
fn a_client_that_reads_slowly_still_gets_the_end() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    let request = Request::Migrate(MigrateRequest {
        to: "h:1".parse().unwrap(),
        dry_run: false,
        streams: None,
        downtime_limit_ms: 300,
        on_no_convergence: Default::default(),
        bandwidth_limit: None,
        shared_memory: false,
        checksums: false,
        compress: Compression::Lz4,
        undecided_after_ms: None,
    });
    let mut heard = 0;
    let report: MigrationReport = connect(&dir)
        .converse(&request, |progress: Option<Progress>| {
            if progress.is_some() && heard == 0 {
                thread::sleep(Duration::from_millis(300));
            }
            heard += u32::from(progress.is_some());
            true
        })
        .unwrap();
    assert_eq!(report.status, MigrationStatus::Failed);
    assert_eq!(report.error, Some(longest_error()));
    assert!((1..10_000).contains(&heard), "progress is dropped, not queued: {heard}");
}

#[test]
fn a_caller_that_stops_waiting_is_told_that_the_vm_goes_on() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    let abandoned =
        connect(&dir).converse::<Progress, ()>(&Request::Cancel {}, |_| false).unwrap_err();
    assert!(matches!(abandoned, ClientError::Abandoned { .. }), "{abandoned}");
}

/// Connects, sends `bytes` and reads until the server closes.
fn raw(dir: &RuntimeDir, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(dir.socket(&"vm0".parse().unwrap())).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn garbage_gets_one_line_that_says_so() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    for garbage in [&b"\n"[..], b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"{\"command\":1}\n"] {
        let answer = raw(&dir, garbage);
        assert!(answer.starts_with("{\"error\":\"not a request"), "{answer}");
        assert_eq!(answer.matches('\n').count(), 1, "{answer}");
    }
    let answer = raw(&dir, &vec![b'x'; LINE_MAX]);
    assert!(answer.contains("one line of at most"), "{answer}");
}

#[test]
fn silent_clients_are_in_nobodys_way() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    let path = dir.socket(&"vm0".parse().unwrap());
    let mut silent = Vec::new();
    for number in 0..100 {
        let mut stream = UnixStream::connect(&path).unwrap();
        if number % 2 == 0 {
            let _ = stream.write_all(b"{\"command\":");
        }
        silent.push(stream);
    }
    let began = Instant::now();
    connect(&dir).ask::<Info>(&Request::Info {}).unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn when_all_places_are_busy_a_client_is_told() {
    let (_temporary, dir) = runtime_dir();
    let _vm = FakeVm::start(&dir, State::Running);
    let path = dir.socket(&"vm0".parse().unwrap());
    let mut waiting = Vec::new();
    for _ in 0..32 {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"command\":\"cancel\"}\n").unwrap();
        stream.read_exact(&mut [0]).expect("it is being served");
        waiting.push(stream);
    }
    let busy = connect(&dir).ask::<Info>(&Request::Info {}).unwrap_err();
    assert!(busy.to_string().contains("busy"), "{busy}");
    // Even when it is told before it could ask.
    let late = connect(&dir);
    thread::sleep(Duration::from_millis(50));
    let busy = late.ask::<Info>(&Request::Info {}).unwrap_err();
    assert!(busy.to_string().contains("busy"), "{busy}");
}

#[test]
fn a_vm_that_ends_is_not_waited_for() {
    let (_temporary, dir) = runtime_dir();
    let vm = FakeVm::start(&dir, State::Running);
    let client = connect(&dir);
    drop(vm);
    let ended = client.ask::<Info>(&Request::Info {}).unwrap_err();
    assert!(matches!(ended, ClientError::Closed { .. }), "{ended}");
}
