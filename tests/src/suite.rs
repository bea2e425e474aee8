//! `cargo lab test`: every test there is, each where it can run.
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::artefacts::{self, Artefacts};
use crate::error::{Context, Result};
use crate::host::{Lab, pass_on};
use crate::{cache, program, tier};

/// How one part of the suite went.
#[derive(Debug)]
pub struct Part {
    name: String,
    passed: bool,
    took: Duration,
    /// What the test programs summed up themselves.
    said: Vec<String>,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = if self.passed { "passed" } else { "FAILED" };
        write!(
            f,
            "{outcome}  {:<44} {:>6.1} s  {}",
            self.name,
            self.took.as_secs_f32(),
            self.said.join("; ")
        )
    }
}

impl Part {
    /// Whether every test of it passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.passed
    }
}

/// Runs the tests whose names contain `filter`; stdout shows each as it goes.
///
/// # Errors
/// If tests cannot be built or run at all. Tests that fail are no error here.
pub fn run(artefacts: &Artefacts, filter: Option<&str>) -> Result<Vec<Part>> {
    let mut parts = vec![here(artefacts, filter)?];
    let programs = programs()?;
    println!("lab: booting the lab host for {} test programs", programs.len());
    let mut lab = Lab::boot(artefacts)?;
    for program in &programs {
        parts.push(inside(&mut lab, program, filter)?);
    }
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
    let since = Instant::now();
    let status = command.stdin(Stdio::null()).status().context(|| "cannot run cargo".into())?;
    let name = "on this machine".into();
    Ok(Part { name, passed: status.success(), took: since.elapsed(), said: Vec::new() })
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

/// Runs a test program inside the lab host.
fn inside(lab: &mut Lab, program: &PathBuf, filter: Option<&str>) -> Result<Part> {
    let mut command: Vec<OsString> =
        vec![program.into(), "--test-threads=1".into(), "--show-output".into()];
    command.extend(filter.map(OsString::from));
    let since = Instant::now();
    let mut printed = Vec::new();
    let status = lab.run(&command, &[(tier::INSIDE, "1")], |stream, bytes| -> io::Result<()> {
        printed.extend_from_slice(bytes);
        pass_on(stream, bytes)
    })?;
    let printed = String::from_utf8_lossy(&printed);
    let said = printed.lines().filter_map(|line| line.strip_prefix("test result: "));
    let said =
        said.map(|line| line.split("; 0 measured").next().unwrap_or(line).to_owned()).collect();
    let name = program.file_stem().unwrap_or_default().to_string_lossy();
    let name = name.rsplit_once('-').map_or(&*name, |(name, _hash)| name);
    Ok(Part {
        name: format!("in the lab host: {name}"),
        passed: status == 0,
        took: since.elapsed(),
        said,
    })
}
