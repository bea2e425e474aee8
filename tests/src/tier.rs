//! Which tests can run where, how those that cannot say so, and what they draw from.
use std::env;
use std::time::{SystemTime, UNIX_EPOCH};

/// Set to `1` by `cargo lab test` for tests that boot lab hosts themselves.
pub const LAB: &str = "UVMM_TEST_LAB";
/// Set to `1` for tests that run inside the lab host.
pub const INSIDE: &str = "UVMM_TEST_INSIDE_LAB";
/// How the line begins that a test prints when it cannot run where it is.
pub const SKIPPED: &str = "skipped: ";
/// The number that tests draw from which do things at random; they print it in this form: `NAME=7`.
pub const SEED: &str = "UVMM_SEED";

/// The number that [`SEED`] gives, or else one of this moment.
///
/// # Panics
/// If it gives no number: whoever wants to see something again should not see something else.
#[must_use]
pub fn seed() -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    env::var(SEED).map_or_else(|_| now(), |seed| seed.parse().expect("UVMM_SEED is a number"))
}

/// Whether `variable` asks for the tests it stands for; if not, says that they are skipped.
///
/// Nothing is skipped silently: `cargo lab test` tells which tests of this machine were, and in the
/// lab host a test that is skipped has failed.
#[must_use]
pub fn wanted(variable: &str) -> bool {
    let wanted = env::var_os(variable).is_some_and(|value| value == "1");
    if !wanted {
        println!("{SKIPPED}needs the lab; `cargo lab test` runs it");
    }
    wanted
}

/// Ends a test that needs the lab when `cargo lab test` did not start it.
#[macro_export]
macro_rules! lab_tier {
    () => {
        if !$crate::tier::wanted($crate::tier::LAB) {
            return;
        }
    };
}

/// Ends a test that runs inside the lab host when it runs elsewhere.
#[macro_export]
macro_rules! inside_lab {
    () => {
        if !$crate::tier::wanted($crate::tier::INSIDE) {
            return;
        }
    };
}
