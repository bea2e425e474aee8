//! A migration as people see it: a bar or lines while it goes on, a table when it is over.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cause::one_line;
use crate::config::Address;
use crate::control::{MigrationReport, Progress};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows progress on standard error.
#[derive(Debug)]
pub struct Display {
    to: Address,
    bar: Option<ProgressBar>,
    last: Option<(Instant, String, u32)>,
}

impl Display {
    /// A bar on a terminal, lines elsewhere.
    #[must_use]
    pub fn new(to: &Address) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{msg:>24} [{wide_bar}] {bytes}/{total_bytes}");
            let style = style.expect("the template is well-formed");
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            bar.with_style(style.progress_chars("=> "))
        });
        Display { to: to.clone(), bar, last: None }
    }

    /// Shows how far it is.
    pub fn show(&mut self, progress: &Progress) {
        let doing = progress.step.as_ref().unwrap_or(&progress.phase);
        let (phase, round) = (one_line(doing), progress.round);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.round_total);
            bar.set_position(progress.round_bytes.min(progress.round_total));
            let rate = progress.throughput_mib_s;
            bar.set_message(format!("{phase} {round} ({rate:.0} MiB/s)"));
            return;
        }
        let due = self.last.as_ref().is_none_or(|(when, last_phase, last_round)| {
            (last_phase, *last_round) != (&phase, round) || when.elapsed() >= LINE_EVERY
        });
        if due {
            let _ = writeln!(io::stderr(), "{}: {}", self.to, line(progress));
            self.last = Some((Instant::now(), phase, round));
        }
    }

    /// Leaves the screen to the report.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(progress: &Progress) -> String {
    if let Some(step) = &progress.step {
        return one_line(step);
    }
    let Progress { round_bytes, round_total, throughput_mib_s: rate, .. } = progress;
    let percent = round_bytes.min(round_total).saturating_mul(100).checked_div(*round_total);
    format!(
        "{}, round {}, {} % of {} MiB, {rate:.0} MiB/s",
        one_line(&progress.phase),
        progress.round,
        percent.unwrap_or(100),
        round_total >> 20,
    )
}

/// The table that ends a migration.
#[must_use]
pub fn report(report: &MigrationReport) -> String {
    let mut table = String::new();
    let mut row = |what: &str, value: String| {
        writeln!(table, "{what:<16} {}", one_line(&value)).expect("a string takes everything");
    };
    row("total time", format!("{:.1} ms", report.total_ms));
    row("downtime", format!("{:.1} ms", report.downtime_ms));
    row("rounds", report.rounds.to_string());
    row("sent", format!("{} MiB", report.bytes_sent >> 20));
    row("throughput", format!("{:.0} MiB/s", report.throughput_mib_s));
    for device in &report.devices {
        let (id, strategy, paused) = (&device.id, &device.strategy, device.paused_ms);
        row("device", format!("{id}: {strategy}, paused for {paused:.1} ms"));
    }
    for (name, value) in &report.more {
        match value {
            serde_json::Value::String(text) => row(name, text.clone()),
            value => row(name, value.to_string()),
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::DeviceReport;

    #[test]
    fn a_line_makes_sense_whatever_the_numbers_are() {
        let mut progress = Progress { phase: "copying".into(), ..Progress::default() };
        assert_eq!(line(&progress), "copying, round 0, 100 % of 0 MiB, 0 MiB/s");
        (progress.round_bytes, progress.round_total) = (1 << 20, 4 << 20);
        assert_eq!(line(&progress), "copying, round 0, 25 % of 4 MiB, 0 MiB/s");
        (progress.round_bytes, progress.round_total) = (u64::MAX, u64::MAX);
        line(&progress);
        progress.step = Some("unplug\nnet0".into());
        assert_eq!(line(&progress), "unplug net0");
    }

    #[test]
    fn the_report_shows_devices_and_whatever_else_the_vm_tells() {
        let mut end = MigrationReport::not_started(String::new());
        (end.downtime_ms, end.bytes_sent) = (12.34, 3 << 20);
        end.devices =
            vec![DeviceReport { id: "net0".into(), strategy: "pause".into(), paused_ms: 5.0 }];
        end.more.insert("note".into(), "did not\nconverge".into());
        let table = report(&end);
        for row in [
            "downtime         12.3 ms",
            "sent             3 MiB",
            "device           net0: pause, paused for 5.0 ms",
            "note             did not converge",
        ] {
            assert!(table.lines().any(|line| line == row), "{table}");
        }
    }
}
