//! Guests that are written to files and run again from them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::typing::Typing;
use super::{Host, Vm, comes_to_run, usable};

/// A VM with a guest that has filled half of its memory and keeps writing.
fn busy(host: &Host) -> Vm {
    let serial = host.path("web.serial");
    let line = format!("run --name web --memory 64M --serial socket={}", serial.display());
    let mut command = host.command(&line);
    command.args(["--cmdline", "run=fill 7 50;rewrite 1 20"]);
    let vm = host.start(command, "web");
    Typing::to(&serial).hear("rewrite ok");
    vm
}

fn copy(host: &Host, name: &str) -> (Vm, Typing) {
    let serial = host.path(&format!("{name}.serial"));
    let file = host.path("web.snap");
    let line = format!("--serial socket={} --restore {}", serial.display(), file.display());
    let vm = host.start(host.command(&format!("run --name {name} {line}")), name);
    (vm, Typing::to(&serial))
}

#[test]
fn a_guest_goes_on_beside_two_whole_copies_of_it() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let file = host.path("web.snap");
    let _web = busy(&host);
    let (written, said) = host.uvmm(&format!("snapshot --vm web {}", file.display()));
    assert!(written && said.contains("web.snap: 3"), "half of it is zero: {said}");
    assert!(comes_to_run(&host));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let (_first, mut to_first) = copy(&host, "first");
    let (_second, mut to_second) = copy(&host, "second");
    to_first.is_whole();
    to_second.is_whole();
    Typing::to(&host.path("web.serial")).is_whole();
    let left = fs::read_dir(host.path("")).unwrap();
    let parts =
        left.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "part"));
    assert_eq!(parts.count(), 0, "nothing else is left");
    assert!(host.has_forgotten(), "nothing was promised to anyone");
}

#[test]
fn a_guest_that_ends_with_its_snapshot_goes_on_from_there() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let web = busy(&host);
    let line = format!("snapshot --stop --json --vm web {}", host.path("web.snap").display());
    let (written, report) = host.uvmm(&line);
    assert!(written && report.contains("\"completed\""), "{report}");
    assert_eq!(web.ended(), Some(0));
    let (_web, mut to_web) = copy(&host, "web");
    to_web.is_whole();
}

#[test]
fn a_paused_guest_is_written_and_restored_as_one() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let _web = busy(&host);
    assert!(host.uvmm("pause --vm web").0);
    assert!(host.uvmm(&format!("snapshot --vm web {}", host.path("web.snap").display())).0);
    assert!(host.uvmm("info --vm web --json").1.contains("\"paused\""));
    let (_copy, mut to_copy) = copy(&host, "copy");
    let start = std::time::Instant::now();
    while !host.uvmm("info --vm copy --json").1.contains("\"paused\"") {
        assert!(start.elapsed().as_secs() < 20);
    }
    assert!(host.uvmm("resume --vm copy").0);
    to_copy.is_whole();
}

#[test]
fn a_snapshot_that_cannot_be_written_or_read_is_one_line_and_hurts_nobody() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let _web = busy(&host);
    for file in ["/dev/null", "/no/such/dir/it", "/"] {
        let (written, said) = host.uvmm(&format!("snapshot --vm web {file}"));
        assert!(!written && said.contains("cannot write") && said.lines().count() == 1, "{said}");
        assert!(comes_to_run(&host));
    }
    let file = host.path("web.snap");
    assert!(host.uvmm(&format!("snapshot --vm web {}", file.display())).0);
    let whole = fs::read(&file).unwrap();
    let mut bent = whole.clone();
    bent[whole.len() / 2] ^= 4;
    let cases = [(&whole[..whole.len() / 2], "ends too early"), (&bent, "damaged")];
    for (bytes, says) in cases {
        fs::write(&file, bytes).unwrap();
        let line = format!("run --name copy --serial null --restore {}", file.display());
        let (ran, said) = host.uvmm(&line);
        let one_line = said.lines().filter(|line| line.starts_with("uvmm: ")).count() == 1;
        assert!(!ran && said.contains(says) && one_line, "{said}");
    }
}
