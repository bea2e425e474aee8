//! `uvmm doctor`: what this host can do, found out by trying.

mod device;
mod guest;
mod host;
mod kvm;

use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::config::HostDevice;

/// How long one trial may take before it counts as failed.
const TRIAL_LIMIT: Duration = Duration::from_secs(10);

/// How a trial came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It works.
    Ok,
    /// It works, but not as well as it could.
    Limited,
    /// It does not, and uvmm does without it.
    Missing,
    /// It does not, and no guest can run, or none with the device that was asked about.
    Fatal,
}

/// One trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was tried.
    pub what: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was seen.
    pub found: String,
    /// What would make it better; empty if nothing is needed.
    pub remedy: String,
}

impl Check {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Check { what, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn not_ok(
        what: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Check { what, verdict, found: found.into(), remedy: remedy.into() }
    }
}

/// Everything that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// In the order of trying.
    pub checks: Vec<Check>,
    /// What they are about.
    about: About,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Host,
    Device,
}

/// Looks at everything that `device` needs to be given to a guest.
#[must_use]
pub fn examine_device(device: &HostDevice) -> Findings {
    Findings { checks: device::examine(device), about: About::Device }
}

/// Tries everything. Takes well under a second, and at most some tens of them on a host that
/// misbehaves.
#[must_use]
pub fn examine() -> Findings {
    let mut checks = kvm::examine();
    checks.extend(host::examine());
    Findings { checks, about: About::Host }
}

impl Findings {
    /// Whether a guest can run, or can have the device.
    #[must_use]
    pub fn can_run(&self) -> bool {
        self.checks.iter().all(|check| check.verdict != Verdict::Fatal)
    }

    /// One JSON object on one line: `can_run`, or `can_assign` of a device, and `checks`.
    #[must_use]
    pub fn json(&self) -> String {
        let can = match self.about {
            About::Host => "can_run",
            About::Device => "can_assign",
        };
        format!("{}\n", json!({ can: self.can_run(), "checks": self.checks }))
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let row = |check: &Check| {
            let verdict = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Limited => "limited",
                Verdict::Missing => "missing",
                Verdict::Fatal => "NO",
            };
            [check.what, verdict, &check.found, &check.remedy].map(str::to_owned)
        };
        let mut rows = vec![["WHAT", "VERDICT", "FOUND", "REMEDY"].map(str::to_owned)];
        rows.extend(self.checks.iter().map(row));
        let widths = [0, 1, 2].map(|column: usize| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        });
        let mut table = String::new();
        for [what, verdict, found, remedy] in &rows {
            let [w, v, f] = widths;
            let line = format!("{what:w$}  {verdict:v$}  {found:f$}  {remedy}");
            table.push_str(line.trim_end());
            table.push('\n');
        }
        let end = match (self.about, self.can_run()) {
            (About::Host, true) => "Guests can run here.",
            (About::Host, false) => "No guest can run here.",
            (About::Device, true) => "A guest can have this device.",
            (About::Device, false) => "No guest can have this device yet.",
        };
        format!("{table}\n{end}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_fatal_finding_is_enough_and_anything_less_is_not() {
        let missing = Check::not_ok("a", Verdict::Missing, "b", "c");
        let mut findings =
            Findings { checks: vec![Check::ok("d", "e"), missing], about: About::Host };
        assert!(findings.can_run() && findings.table().ends_with("Guests can run here.\n"));
        findings.checks.push(Check::not_ok("f", Verdict::Fatal, "g", "h"));
        assert!(!findings.can_run() && findings.table().ends_with("No guest can run here.\n"));
        let object: serde_json::Value = serde_json::from_str(&findings.json()).unwrap();
        assert_eq!(object["can_run"], false);
        assert_eq!(object["checks"][2]["verdict"], "fatal");
        findings.about = About::Device;
        assert!(findings.table().ends_with("No guest can have this device yet.\n"));
        let object: serde_json::Value = serde_json::from_str(&findings.json()).unwrap();
        assert_eq!(object["can_assign"], false);
    }

    #[test]
    fn the_examination_of_any_host_ends_and_says_what_it_saw() {
        let findings = examine();
        assert!(findings.checks.len() > 5);
        for check in &findings.checks {
            assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
            assert!(check.verdict != Verdict::Fatal || !check.remedy.is_empty(), "{check:?}");
        }
    }
}
