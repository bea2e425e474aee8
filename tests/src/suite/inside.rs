//! A test program inside a lab host.
use std::path::Path;
use std::time::Instant;

use super::attempt::{self, Outcome, Outcomes};
use super::{Part, name};
use crate::error::Result;

/// Runs the tests of `program`, each at most `tries` times, and shows each line that they print with
/// the name of the program; tells whether all passed.
///
/// # Errors
/// If the program cannot be run.
pub fn run(program: &Path, filter: Option<&str>, tries: u8) -> Result<bool> {
    let name = name(program);
    let since = Instant::now();
    let say = |line: &str| println!("{name:<12} {line}");
    let mut outcomes = Outcomes::default();
    for test in attempt::tests(program, filter)? {
        let since = Instant::now();
        let outcome = attempt::run(program, &test, tries, say)?;
        let word = if outcome == Outcome::Failed { "FAILED" } else { "passed" };
        say(&format!("{word} {test} ({:.1} s)", since.elapsed().as_secs_f32()));
        outcomes.add(test, outcome);
    }
    let passed = outcomes.all_passed();
    println!("{}", Part::inside(&name, passed, since.elapsed(), &outcomes.to_string()));
    Ok(passed)
}
