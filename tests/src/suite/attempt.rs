//! One test of a test program, in a process of its own.
use std::convert::Infallible;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::{Context, Error, Result};
use crate::program;
use crate::tier::SKIPPED;

/// No test takes so long, unless the lab host stands still.
pub(super) const LIMIT: Duration = Duration::from_secs(15 * 60);

/// The names of the tests of `program` that contain `filter`, without those that are ignored.
///
/// # Errors
/// If the program cannot list them.
pub(super) fn tests(program: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let mut list = Command::new(program);
    let listed = program::run(list.args(["--list", "--format=terse"]).args(filter))?;
    let name = |line: &str| line.strip_suffix(": test").map(str::to_owned);
    Ok(listed.lines().filter_map(name).collect())
}

/// Runs one test, and tells whether it passed; `show` gets each line that it prints.
///
/// # Errors
/// If the program cannot be run, or the test comes to no end.
pub(super) fn passes(program: &Path, test: &str, show: impl Fn(&str)) -> Result<bool> {
    passes_within(LIMIT, program, test, show)
}

fn passes_within(limit: Duration, program: &Path, test: &str, show: impl Fn(&str)) -> Result<bool> {
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]);
    let cannot = || format!("cannot run {}", program.display());
    // Panics and warnings go where the rest goes, in their order.
    let (reader, writer) = std::io::pipe().context(cannot)?;
    command.stdin(Stdio::null()).stderr(writer.try_clone().context(cannot)?).stdout(writer);
    let since = Instant::now();
    let mut child = command.process_group(0).spawn().context(cannot)?;
    let _in_time = end_after(limit, &child)?;
    // It holds the pipe's other end too, and the lines would never end.
    drop(command);
    let mut skipped = false;
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context(|| format!("cannot read what {test} prints"))?;
        let line = String::from_utf8_lossy(&line);
        skipped |= line.starts_with(SKIPPED);
        if !is_frame(&line) {
            show(&line);
        }
    }
    let status = child.wait().context(|| format!("cannot wait for {test}"))?;
    if !status.success() && since.elapsed() >= limit {
        return Err(Error::Timeout(format!("{test} came to no end in {limit:.0?}")));
    }
    Ok(status.success() && !skipped)
}

/// Ends `child` and its children after `limit`, unless what this gives is dropped before.
fn end_after(limit: Duration, child: &Child) -> Result<Sender<Infallible>> {
    let group = Pid::from_child(child);
    let (in_time, ended) = channel();
    let end = move || {
        if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            let _gone = kill_process_group(group, Signal::KILL);
        }
    };
    let thread = Builder::new().name("limit".into()).spawn(end);
    thread.context(|| "cannot start a thread".into()).map(|_| in_time)
}

/// Whether the harness of the test program printed `line`, about a single test of which its caller
/// says more.
fn is_frame(line: &str) -> bool {
    line.is_empty() || line == "running 1 test" || line.starts_with("test result: ")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A program that does what `does` says.
    fn script(dir: &Path, does: &str) -> PathBuf {
        let program = dir.join("script");
        fs::write(&program, format!("#!/bin/sh\n{does}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    #[test]
    fn a_test_that_is_skipped_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "echo 'skipped: for no reason'");
        assert!(!passes(&program, "sometimes", |_| ()).unwrap());
    }

    #[test]
    fn a_test_that_takes_too_long_is_ended_with_its_children() {
        let mut sleeping = Command::new("sh");
        sleeping.args(["-c", "sleep 600 & sleep 600"]).process_group(0).stdout(Stdio::piped());
        let mut child = sleeping.spawn().unwrap();
        let _in_time = end_after(Duration::from_millis(10), &child).unwrap();
        let ends = BufReader::new(child.stdout.take().unwrap()).lines().count();
        assert_eq!((ends, child.wait().unwrap().success()), (0, false));
    }

    #[test]
    fn a_test_that_comes_to_no_end_has_not_just_failed() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "sleep 600");
        let endless = passes_within(Duration::from_millis(10), &program, "endless", |line| {
            panic!("{line}");
        });
        assert!(matches!(endless, Err(Error::Timeout(_))), "{endless:?}");
    }

    #[test]
    fn what_a_test_prints_is_shown_but_for_its_frame() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "echo; echo running 1 test; echo $3 $2 >&2; exit 1");
        let shown = std::cell::RefCell::new(Vec::new());
        let show = |line: &str| shown.borrow_mut().push(line.to_owned());
        assert!(!passes(&program, "never", show).unwrap());
        assert!(passes(Path::new("true"), "always", show).unwrap());
        assert_eq!(*shown.borrow(), ["--nocapture never"]);
    }
}
