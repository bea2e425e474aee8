//! `cargo lab test`: every test there is, each where it can run.
mod attempt;
mod hosts;
pub mod inside;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::artefacts::{self, Artefacts};
use crate::error::{Context, Result};
use crate::tier::SKIPPED;
use crate::{cache, program, tier};

const PASSED: &str = "passed";
const FAILED: &str = "FAILED";
/// What is in front of the name of a test that failed; and of one that passed at a later try.
const FAILED_TEST: &str = "; failed: ";
const FLAKY_TEST: &str = "; flaky: ";

/// How one part of the suite went, in one line.
#[derive(Debug)]
pub struct Part(String);

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Part {
    fn new(name: &str, passed: bool, took: Duration, said: &str) -> Self {
        let (outcome, took) = (if passed { PASSED } else { FAILED }, took.as_secs_f32());
        Self(format!("{outcome}  {name:<32} {took:>6.1} s  {said}"))
    }

    /// A test program in a lab host.
    fn inside(name: &str, passed: bool, took: Duration, said: &str) -> Self {
        Self::new(&format!("in the lab host: {name}"), passed, took, said)
    }

    /// The part that `line` tells of, if it does.
    fn told(line: &str) -> Option<Self> {
        let told = [PASSED, FAILED].iter().any(|outcome| line.starts_with(&format!("{outcome}  ")));
        told.then(|| Self(line.to_owned()))
    }

    /// Which of its tests failed.
    fn failed(&self) -> impl Iterator<Item = &str> {
        self.0.split(FAILED_TEST).skip(1)
    }

    /// The same, if what failed passed at a later try.
    fn flaky(&self) -> Self {
        let line = self.0.replacen(FAILED, PASSED, 1).replace(FAILED_TEST, FLAKY_TEST);
        Self(if line.contains(FLAKY_TEST) { line } else { format!("{line}; flaky") })
    }

    /// Whether every test of it passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.0.starts_with(PASSED)
    }
}

/// Runs the tests whose names contain `filter`; stdout shows each as it goes.
///
/// # Errors
/// If tests cannot be built or run at all. Tests that fail are no error here.
pub fn run(artefacts: &Artefacts, filter: Option<&str>) -> Result<Vec<Part>> {
    // Before it is built anew with the tests: the kernel then calls this one deleted.
    let lab_itself = std::env::current_exe().context(|| "cannot find this program".into())?;
    let mut parts = vec![here(artefacts, filter)?];
    let programs = programs()?;
    println!("lab: booting lab hosts for {} test programs", programs.len());
    let seed = tier::seed().to_string();
    parts.extend(hosts::Run { artefacts, lab_itself, filter, seed }.all(programs)?);
    Ok(parts)
}

/// The tests of all crates on this machine: those that need no KVM, those on this machine's own
/// KVM if it has one, and those that boot lab hosts themselves.
fn here(artefacts: &Artefacts, filter: Option<&str>) -> Result<Part> {
    let mut command = artefacts::cargo();
    if program::run(artefacts::cargo().args(["nextest", "--version"])).is_ok() {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests=pass"]);
        // What runs in the lab host would only say here that it is skipped.
        command.args(["-E", "not package(tests) or not kind(test) or binary(exec)"]).args(filter);
    } else {
        command.args(["test", "--workspace", "--no-fail-fast", "--"]).args(filter);
    }
    command.env("UVMM", &artefacts.uvmm).env(tier::LAB, "1");
    command.env("CARGO_TARGET_DIR", cache::target()?);
    // Without nextest there is no report; the tests themselves print what they skip.
    let report = artefacts::workspace().join("target/nextest/default/junit.xml");
    let _ = fs::remove_file(&report);
    let since = Instant::now();
    let status = command.stdin(Stdio::null()).status().context(|| "cannot run cargo".into())?;
    let report = fs::read_to_string(report).unwrap_or_default();
    let skipped = skipped(&report);
    for test in &skipped {
        println!("{SKIPPED}{test}");
    }
    let said = format!("{} skipped", skipped.len());
    Ok(Part::new("on this machine", status.success(), since.elapsed(), &said))
}

/// The tests of a JUnit report that say in their output that they were skipped.
fn skipped(report: &str) -> Vec<&str> {
    let says_so = |case: &&str| case.contains(SKIPPED);
    let cases = report.split("<testcase name=\"").skip(1).filter(says_so);
    cases.filter_map(|case| case.split_once('"')).map(|(name, _)| name).collect()
}

/// The test programs of this package, built.
fn programs() -> Result<Vec<PathBuf>> {
    let mut command = artefacts::cargo();
    command.args([
        "test",
        "--package",
        "tests",
        "--tests",
        "--no-run",
        "--quiet",
        "--message-format=json",
    ]);
    let messages = program::run(command.env("CARGO_TARGET_DIR", cache::target()?))?;
    let program = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let target = &message["target"];
        // `exec` boots lab hosts: it has run on this machine.
        let wanted = target["kind"][0] == "test" && target["name"] != "exec";
        wanted.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    };
    Ok(messages.lines().filter_map(program).collect())
}

/// What Cargo calls a program that it built.
fn name(program: &Path) -> String {
    let stem = program.file_stem().unwrap_or_default().to_string_lossy();
    stem.rsplit_once('-').map_or(&*stem, |(name, _hash)| name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_found_in_a_part_and_named_when_it_passed_later() {
        let part =
            Part::inside("pci", false, Duration::from_secs(3), "2 passed; failed: a; failed: b");
        assert_eq!(part.failed().collect::<Vec<_>>(), ["a", "b"]);
        let later = part.flaky();
        assert!(!part.passed() && later.passed());
        assert!(later.to_string().ends_with("2 passed; flaky: a; flaky: b"), "{later}");
        let endless = Part::inside("pci", false, Duration::ZERO, "its end was not seen");
        assert_eq!(endless.failed().count(), 0);
        assert!(endless.flaky().passed() && endless.flaky().to_string().ends_with("; flaky"));
    }

    #[test]
    fn skipped_tests_are_found_in_a_report() {
        let report = r#"<testsuite name="vmm"><testcase name="a" time="1"/>
            <testcase name="b::c" time="1"><system-out>
skipped: no usable KVM</system-out></testcase><testcase name="d"></testcase></testsuite>"#;
        assert_eq!(skipped(report), ["b::c"]);
    }
}
