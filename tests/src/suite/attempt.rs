//! One test of a test program, in a process of its own, and again if it failed.
//!
//! Where the lab host is emulated it is slow, and slower at times. A test that passes at a later try
//! is called flaky, and told of by name. What it draws at random is the same at each try: other luck
//! would hide what the first one found.
use std::convert::Infallible;
use std::fmt;
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
use crate::tier::{self, SEED, SKIPPED};

/// No test takes so long, unless the lab host stands still.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// How one test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It passed at this try; the first is 1.
    Passed(u8),
    /// It failed at every try.
    Failed,
}

/// The outcomes of a test program's tests.
#[derive(Debug, Default)]
pub(super) struct Outcomes(Vec<(String, Outcome)>);

impl Outcomes {
    pub(super) fn add(&mut self, test: String, outcome: Outcome) {
        self.0.push((test, outcome));
    }

    pub(super) fn all_passed(&self) -> bool {
        self.failed().is_empty()
    }

    fn failed(&self) -> Vec<&str> {
        let failed = |(_, outcome): &&(String, Outcome)| *outcome == Outcome::Failed;
        self.0.iter().filter(failed).map(|(test, _)| test.as_str()).collect()
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.failed();
        write!(f, "{} passed", self.0.len() - failed.len())?;
        for (test, outcome) in &self.0 {
            match outcome {
                Outcome::Passed(1) => {}
                Outcome::Passed(tries) => write!(f, "; flaky, at try {tries}: {test}")?,
                Outcome::Failed => write!(f, "; failed: {test}")?,
            }
        }
        Ok(())
    }
}

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

/// Runs one test, at most `tries` times, until it passes; `show` gets each line that it prints.
///
/// # Errors
/// If the program cannot be run, or the test comes to no end.
pub(super) fn run(program: &Path, test: &str, tries: u8, show: impl Fn(&str)) -> Result<Outcome> {
    run_within(LIMIT, program, test, tries, show)
}

fn run_within(
    limit: Duration,
    program: &Path,
    test: &str,
    tries: u8,
    show: impl Fn(&str),
) -> Result<Outcome> {
    let seed = tier::seed().to_string();
    for attempt in 1..=tries {
        if attempt > 1 {
            show(&format!("{test}: try {attempt} of {tries}"));
        }
        let mut command = Command::new(program);
        command.args(["--exact", test, "--nocapture"]).env(SEED, &seed);
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
        if status.success() && !skipped {
            return Ok(Outcome::Passed(attempt));
        }
        if since.elapsed() >= limit {
            return Err(Error::Timeout(format!("{test} came to no end in {limit:.0?}")));
        }
    }
    Ok(Outcome::Failed)
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

    #[test]
    fn flaky_and_failed_tests_are_named() {
        let mut outcomes = Outcomes::default();
        outcomes.add("calm".into(), Outcome::Passed(1));
        outcomes.add("moody".into(), Outcome::Passed(3));
        assert_eq!(outcomes.to_string(), "2 passed; flaky, at try 3: moody");
        assert!(outcomes.all_passed());
        outcomes.add("broken".into(), Outcome::Failed);
        assert!(!outcomes.all_passed());
        assert!(outcomes.to_string().ends_with("; failed: broken"));
    }

    #[test]
    fn a_test_that_fails_is_tried_as_often_as_allowed() {
        let shown = std::cell::RefCell::new(Vec::new());
        let show = |line: &str| shown.borrow_mut().push(line.to_owned());
        let run = |tries| run(Path::new("false"), "never", tries, show).unwrap();
        assert_eq!((run(1), shown.borrow().len()), (Outcome::Failed, 0));
        assert_eq!(run(3), Outcome::Failed);
        assert_eq!(*shown.borrow(), ["never: try 2 of 3", "never: try 3 of 3"]);
    }

    #[test]
    fn each_try_draws_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "echo \"seed $UVMM_SEED $$\"; exit 1");
        let shown = std::cell::RefCell::new(Vec::new());
        let show = |line: &str| shown.borrow_mut().push(line.to_owned());
        assert_eq!(run(&program, "unlucky", 2, show).unwrap(), Outcome::Failed);
        let seed = |line: &String| line.split(' ').nth(1).and_then(|seed| seed.parse::<u64>().ok());
        let seeds: Vec<_> =
            shown.borrow().iter().filter(|l| l.starts_with("seed")).map(seed).collect();
        assert!(seeds.len() == 2 && seeds[0] == seeds[1] && seeds[0].is_some(), "{shown:?}");
    }

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
        assert_eq!(run(&program, "sometimes", 1, |_| ()).unwrap(), Outcome::Failed);
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
    fn a_test_that_comes_to_no_end_is_not_tried_again_here() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "sleep 600");
        let endless = run_within(Duration::from_millis(10), &program, "endless", 2, |line| {
            panic!("{line}");
        });
        assert!(matches!(endless, Err(Error::Timeout(_))), "{endless:?}");
    }

    #[test]
    fn a_test_that_passes_is_not_tried_again() {
        let outcome = run(Path::new("true"), "always", 3, |_| ()).unwrap();
        assert_eq!(outcome, Outcome::Passed(1));
    }
}
