//! Which tests can run where, and how those that cannot say so.
use std::env;

/// Set to `1` by `cargo lab test` for tests that boot lab hosts themselves.
pub const LAB: &str = "UVMM_TEST_LAB";
/// Set to `1` for tests that run inside the lab host.
pub const INSIDE: &str = "UVMM_TEST_INSIDE_LAB";

/// Whether `variable` asks for the tests it stands for; if not, says that they are skipped.
///
/// In CI nothing may be skipped silently: there, [`crate::lab_tier!`] outside a lab run still
/// prints its line, and `cargo lab test` counts what ran.
#[must_use]
pub fn wanted(variable: &str) -> bool {
    let wanted = env::var_os(variable).is_some_and(|value| value == "1");
    if !wanted {
        println!("skipped: needs the lab; `cargo lab test` runs it");
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
