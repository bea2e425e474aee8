//! `cargo lab exec` passes everything through: seen from outside, CMD might run right here.
//!
//! Each of these boots a lab host, so they run only when `cargo lab test` asks for them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tests::lab_tier;

fn exec(words: &[&OsStr]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.args(["exec", "--"]).args(words).stdin(Stdio::null());
    command
}

fn shell(script: &str) -> Command {
    exec(&["sh", "-c", script].map(OsStr::new))
}

fn output(command: &mut Command) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

#[test]
fn arguments_and_streams_arrive_byte_by_byte() {
    lab_tier!();
    let odd = OsStr::from_bytes(b"\xff '\"$\n\\ *");
    let got = output(&mut exec(
        &["printf", "%s|"]
            .map(OsStr::new)
            .into_iter()
            .chain([odd, OsStr::new("")])
            .collect::<Vec<_>>(),
    ));
    assert_eq!(got.stdout, b"\xff '\"$\n\\ *||");
    assert_eq!(got.stderr, b"");
    let got = output(&mut shell("echo out; echo err >&2; exit 7"));
    assert_eq!(
        (got.status.code(), got.stdout, got.stderr),
        (Some(7), b"out\n".into(), b"err\n".into())
    );
}

#[test]
fn input_of_any_size_is_passed_with_its_end() {
    lab_tier!();
    let input = (0..3_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect::<Vec<_>>();
    let mut child = shell("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = input.clone();
    let writer = std::thread::Builder::new().spawn(move || stdin.write_all(&sent)).unwrap();
    let mut received = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut received).unwrap();
    writer.join().unwrap().unwrap();
    assert!(received == input, "{} bytes came back of {}", received.len(), input.len());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_signal_reaches_the_command_and_its_status_comes_back() {
    lab_tier!();
    for (signal, script, status) in [
        (Signal::TERM, "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done", 5),
        (Signal::INT, "trap 'exit 6' INT; echo up; while :; do sleep 0.1; done", 6),
        (Signal::HUP, "echo up; exec sleep 1000", 128 + 1),
    ] {
        let mut child = shell(script).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(end(&mut child), Some(status), "{signal:?}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    lab_tier!();
    let mut child =
        shell("yes; echo $? >&2").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 100_000]).unwrap();
    assert_eq!(end(&mut child), Some(0));
    let mut errors = String::new();
    child.stderr.unwrap().read_to_string(&mut errors).unwrap();
    assert_eq!(errors, "141\n", "128 + SIGPIPE, as on this machine");
}

#[test]
fn the_files_of_this_machine_are_there_and_stay_as_they_are() {
    lab_tier!();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "here").unwrap();
    let got = output(
        shell("cat file; echo there > file; cat file; touch new; pwd; id -u")
            .current_dir(dir.path()),
    );
    let want = format!("herethere\n{}\n0\n", dir.path().display());
    assert_eq!(String::from_utf8_lossy(&got.stdout), want);
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"here");
    assert!(!dir.path().join("new").exists());
}

#[test]
fn the_environment_says_what_there_is() {
    lab_tier!();
    let got = output(&mut shell(
        "set -eu
        for file in \"$UVMM\" \"$GUEST_KERNEL\" \"$GUEST_INITRD\"; do test -s \"$file\"; done
        test -c /dev/kvm
        for nic in $PF0 $PF1; do test \"$(cat /sys/class/net/$nic/carrier)\" = 1; done
        for vf in $VF0 $VF1; do test -e /sys/bus/pci/drivers/vfio-pci/$vf; done
        ping -c 1 -W 5 $PEER_IP >/dev/null
        free -m | awk '/^Mem/ { exit $2 < 11500 }'",
    ));
    assert_eq!(got.status.code(), Some(0), "{}", String::from_utf8_lossy(&got.stderr));
}

#[test]
fn a_command_that_is_not_there_is_a_clear_error() {
    lab_tier!();
    let got = output(&mut exec(&[OsStr::new("no-such-program")]));
    assert_eq!(got.status.code(), Some(127));
    let said = String::from_utf8_lossy(&got.stderr);
    // The first lab host after a build says before that it is booted from nothing.
    let last = "lab: cannot run no-such-program: No such file or directory (os error 2)";
    assert_eq!(said.lines().last(), Some(last), "{said}");
}

fn end(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(120);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("the command did not end");
}
