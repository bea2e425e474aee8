//! The `uvmm` command against a VM that exists only here: its control socket and nothing behind.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use serde_json::{Value, json};
use vmm::control::{
    Call, DryRun, Info, MigrationReport, MigrationStatus, PlannedStep, Progress, Replier, Request,
    RuntimeDir, Server, SlotProgress, SlotStage, State, Undecided,
};

/// A directory with VMs in it, and the requests they got.
struct Host {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Request>>>,
}

struct FakeVm {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn migration_report() -> MigrationReport {
    MigrationReport {
        status: MigrationStatus::Completed,
        error: None,
        total_ms: 1000.0,
        downtime_ms: 25.5,
        rounds: 3,
        bytes_sent: 512 << 20,
        throughput_mib_s: 512.0,
        ..MigrationReport::not_started(String::new())
    }
}

/// What the VM called by this name would answer.
fn answer(name: &str, call: Call, waiting: &mut Vec<Replier>, stop: &AtomicBool) {
    let Call { request, mut reply } = call;
    match request {
        Request::Info {} => reply.finish(Ok(Info {
            name: name.parse().unwrap(),
            state: State::Running,
            cpus: 2,
            cpu: "host".into(),
            memory: 512 << 20,
            pid: std::process::id(),
            uptime_ms: 5,
            serial: "null".parse().unwrap(),
            incoming: None,
            migration: None,
            slots: Vec::new(),
            counters: [].into(),
        })),
        Request::Migrate(migrate) if migrate.dry_run => {
            let step = |step: &str| PlannedStep { phase: "quiesce".into(), step: step.into() };
            let plan = vec![step("stop vCPUs"), step("last pass over memory")];
            reply.finish(Ok(DryRun { to: migrate.to, devices: Vec::new(), plan }));
        }
        Request::Migrate(migrate) => {
            reply.progress(&Progress { phase: "copying".into(), ..Progress::default() });
            match migrate.to.to_string().as_str() {
                "tcp:refused:1" => reply.finish::<()>(Err("connection refused".into())),
                "tcp:slow:1" => waiting.push(reply),
                _ => reply.finish(Ok(migration_report())),
            }
        }
        Request::Cancel {} => {
            let cancelled = MigrationReport {
                status: MigrationStatus::Cancelled,
                ..MigrationReport::not_started("someone asked for it".into())
            };
            waiting.drain(..).for_each(|migrate| migrate.finish(Ok(&cancelled)));
            reply.finish(Ok(()));
        }
        Request::Stop { force } => {
            stop.store(force, Ordering::SeqCst);
            reply.finish(Ok(()));
        }
        Request::Resolve { decision: None } => reply.finish(Ok(Undecided {
            token: "c0ffee".into(),
            to: "other:1".parse().unwrap(),
            stopped_s: 7,
        })),
        Request::Plug { device, timeout_ms: 30_000 } => {
            for stage in [SlotStage::Asked, SlotStage::Accepted, SlotStage::Enabled] {
                reply.progress(&SlotProgress { slot: 3, stage });
            }
            assert_eq!(device.slot, Some(3));
            reply.finish(Ok(3));
        }
        Request::Unplug { timeout_ms: 500, .. } => {
            reply.progress(&SlotProgress { slot: 3, stage: SlotStage::Asked });
            reply.finish::<u8>(Err("the guest did not answer".into()));
        }
        _ => reply.finish(Ok(())),
    }
}

impl Host {
    fn new() -> Self {
        Host { dir: tempfile::tempdir().unwrap(), asked: Arc::default() }
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn vm(&self, name: &str) -> FakeVm {
        let dir = RuntimeDir::at(self.runtime_dir()).unwrap();
        let claim = dir.claim(Some(&name.parse().unwrap())).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, own_name, own_stop) = (self.asked.clone(), name.to_owned(), stop.clone());
        let mut waiting = Vec::new();
        let server = Server::new(&claim, move |call| {
            asked.lock().unwrap().push(call.request.clone());
            answer(&own_name, call, &mut waiting, &own_stop);
        });
        let server = server.unwrap();
        let ended = stop.clone();
        let run = move || {
            let mut events = EventManager::<Server>::new().unwrap();
            events.add_subscriber(server);
            while !ended.load(Ordering::SeqCst) {
                events.run_with_timeout(5).unwrap();
            }
            drop(claim);
        };
        FakeVm { stop, thread: Some(thread::Builder::new().spawn(run).unwrap()) }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_uvmm"));
        command.args(line.split_whitespace()).env("UVMM_RUNTIME_DIR", self.runtime_dir());
        command.env("UVMM_STATE_DIR", self.state_dir());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn uvmm(&self, line: &str) -> (i32, String, String) {
        outcome(self.command(line).output().unwrap())
    }

    fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().drain(..).map(|request| json!(request)).collect()
    }
}

fn outcome(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn vms_are_listed_and_shown() {
    let host = Host::new();
    assert_eq!(host.uvmm("ls --json"), (0, "[]\n".into(), String::new()));
    let _vms = [host.vm("a"), host.vm("b")];
    let (status, table, _) = host.uvmm("ls");
    assert_eq!((status, table.lines().count()), (0, 3), "{table}");
    let (_, list, _) = host.uvmm("ls --json");
    assert_eq!(serde_json::from_str::<Value>(&list).unwrap()[1]["name"], "b");
    let (status, _, error) = host.uvmm("info");
    let several = "uvmm: several VMs are running: choose one with --vm (a, b)\n";
    assert_eq!((status, error.as_str()), (1, several));
    let (status, page, _) = host.uvmm("info --vm b");
    assert!(status == 0 && page.contains("name         b\n"), "{page}");
}

#[test]
fn plain_commands_reach_the_vm() {
    let host = Host::new();
    let _vm = host.vm("a");
    for command in ["pause", "resume", "cancel"] {
        assert_eq!(host.uvmm(command), (0, String::new(), String::new()));
        assert_eq!(host.asked(), [json!({ "command": command })]);
    }
}

#[test]
fn stop_waits_until_the_vm_is_gone_and_says_when_it_stays() {
    let host = Host::new();
    let _vm = host.vm("a");
    let (status, _, error) = host.uvmm("stop --timeout 100ms");
    assert!(status == 1 && error.contains("did not end within 100ms"), "{error}");
    assert!(error.contains("uvmm stop --force --vm a"), "{error}");
    assert_eq!(host.uvmm("stop --force").0, 0);
    assert_eq!(host.uvmm("ls --json").1, "[]\n");
}

#[test]
fn a_migration_ends_with_a_report() {
    let host = Host::new();
    let _vm = host.vm("a");
    let line = "migrate --to tcp:h:1 --streams 2 --downtime-limit 1s --bandwidth-limit 1M";
    let (status, report, lines) = host.uvmm(line);
    assert!(status == 0 && report.contains("downtime         25.5 ms"), "{report}");
    assert!(lines.starts_with("tcp:h:1: copying, round 0"), "{lines}");
    let asked = &host.asked()[0];
    assert_eq!(asked["streams"], 2);
    assert_eq!(asked["downtime_limit_ms"], 1000);
    assert_eq!(asked["bandwidth_limit"], 1 << 20);

    let (status, object, _) = host.uvmm("migrate --to tcp:h:1 --json");
    assert_eq!((status, object.lines().count()), (0, 1));
    let object: Value = serde_json::from_str(&object).unwrap();
    assert_eq!((&object["status"], &object["rounds"]), (&json!("completed"), &json!(3)));
}

#[test]
fn a_migration_that_fails_says_why_in_words_and_in_json() {
    let host = Host::new();
    let _vm = host.vm("a");
    let (status, object, lines) = host.uvmm("migrate --to refused:1 --json");
    assert_eq!(status, 1);
    let object: Value = serde_json::from_str(&object).unwrap();
    assert_eq!(object["status"], "failed");
    assert_eq!(object["error"], "a: connection refused");
    assert_eq!(lines.lines().last(), Some("uvmm: a: connection refused"));
}

#[test]
fn a_dry_run_prints_the_plan_in_order() {
    let host = Host::new();
    let _vm = host.vm("a");
    let (status, page, _) = host.uvmm("migrate --to h:1 --dry-run");
    let steps: Vec<_> = page.lines().skip(1).map(str::trim).collect();
    assert_eq!((status, steps), (0, vec!["quiesce  stop vCPUs", "quiesce  last pass over memory"]));
}

fn wait_for(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(10), "it never came");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupt_cancels_and_waits_for_the_outcome() {
    let host = Host::new();
    let _vm = host.vm("a");
    let migrate = host.command("migrate --to slow:1 --json").spawn().unwrap();
    wait_for(|| !host.asked.lock().unwrap().is_empty());
    let pid = rustix::process::Pid::from_child(&migrate);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let (status, object, _) = outcome(migrate.wait_with_output().unwrap());
    let object: Value = serde_json::from_str(&object).unwrap();
    assert_eq!((status, &object["status"]), (1, &json!("cancelled")));
    assert_eq!(host.asked()[1], json!({ "command": "cancel" }));
}

#[test]
fn a_vm_that_dies_during_its_migration_leaves_it_undecided() {
    let host = Host::new();
    let vm = host.vm("a");
    let migrate = host.command("migrate --to slow:1 --json").spawn().unwrap();
    wait_for(|| !host.asked.lock().unwrap().is_empty());
    drop(vm);
    let (status, object, _) = outcome(migrate.wait_with_output().unwrap());
    let object: Value = serde_json::from_str(&object).unwrap();
    assert_eq!((status, &object["status"]), (1, &json!("undecided")));
    assert!(object["error"].as_str().unwrap().contains("without an answer"), "{object}");
}

#[test]
fn an_undecided_migration_is_only_decided_on_purpose() {
    let host = Host::new();
    let _vm = host.vm("a");
    let (status, page, _) = host.uvmm("resolve");
    assert!(status == 0 && page.contains("c0ffee") && page.contains("--discard"), "{page}");
    let (status, _, error) = host.uvmm("resolve --run-here");
    assert!(status == 1 && error.contains("both will write to the same disks"), "{error}");
    assert!(host.asked().iter().all(|request| request["decision"].is_null()));
    assert_eq!(host.uvmm("resolve --run-here --yes").0, 0);
    assert_eq!(host.asked().last().unwrap()["decision"], "run-here");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let host = Host::new();
    let mut child = host.command("doctor").spawn().unwrap();
    drop(child.stdout.take());
    let (_, _, error) = outcome(child.wait_with_output().unwrap());
    assert_eq!(error, "");
}

#[test]
fn every_error_is_one_line() {
    let host = Host::new();
    let nowhere = Path::new("/proc/none");
    for line in [
        "",
        "run --memory 1M",
        "run --memory 100000T",
        "run --cpus 0",
        "run --config /none",
        "run --config /dev/zero",
        "run --log /none/log",
        "run --kernel k --incoming tcp:h:1",
        "ls --what",
        "info",
        "info --vm a",
        "migrate --to h:1",
        "migrate --to h:1 --streams 0",
    ] {
        let (status, out, error) = host.uvmm(line);
        assert!(status != 0 && out.is_empty(), "{line}: {status} {out}");
        assert!(error.starts_with("uvmm: ") && error.lines().count() == 1, "{line}: {error}");
    }
    let unusable = host.command("ls").env("UVMM_RUNTIME_DIR", nowhere).output().unwrap();
    let (status, _, error) = outcome(unusable);
    assert!(status == 1 && error.contains("set UVMM_RUNTIME_DIR to another"), "{error}");
}

#[test]
fn a_device_goes_in_with_a_line_for_every_step_or_stays_with_the_reason() {
    let host = Host::new();
    let _vm = host.vm("web");
    let (status, printed, errors) =
        host.uvmm("plug --device vfio,id=net0,host=0000:01:10.0,slot=3");
    assert_eq!((status, printed.as_str()), (0, "net0 is in slot 3\n"), "{errors}");
    let lines: Vec<_> = errors.lines().collect();
    assert_eq!(
        lines,
        [
            "uvmm: net0: slot 3: asked",
            "uvmm: net0: slot 3: accepted, its power light blinks",
            "uvmm: net0: slot 3: enabled",
        ]
    );
    let (status, printed, errors) = host.uvmm("unplug net0 --timeout 500ms");
    assert_eq!((status, printed.as_str()), (1, ""));
    assert!(errors.ends_with("uvmm: web: the guest did not answer\n"), "{errors}");
}
