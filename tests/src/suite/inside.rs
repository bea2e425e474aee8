//! A test program inside a lab host.
use std::path::Path;
use std::time::Instant;

use super::{FAILED, FAILED_TEST, PASSED, Part, attempt, name};
use crate::error::Result;

/// Runs the tests of `program`, and shows each line that they print with the name of the program;
/// tells whether all passed.
///
/// # Errors
/// If the program cannot be run.
pub fn run(program: &Path, filter: Option<&str>) -> Result<bool> {
    let name = name(program);
    let since = Instant::now();
    let say = |line: &str| println!("{name:<12} {line}");
    let (mut passed, mut failed) = (0, String::new());
    for test in attempt::tests(program, filter)? {
        let since = Instant::now();
        let passes = attempt::passes(program, &test, say)?;
        let word = if passes { PASSED } else { FAILED };
        say(&format!("{word} {test} ({:.1} s)", since.elapsed().as_secs_f32()));
        if passes {
            passed += 1;
        } else {
            failed.extend([FAILED_TEST, &test]);
        }
    }
    let said = format!("{passed} passed{failed}");
    println!("{}", Part::inside(&name, failed.is_empty(), since.elapsed(), &said));
    Ok(failed.is_empty())
}
