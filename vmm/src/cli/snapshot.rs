//! `uvmm snapshot`: write a guest to a file, and say what it came to.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{Outcome, Vm, complain, print};
use crate::cause;
use crate::control::{MigrationReport, MigrationStatus, Progress, Request, SnapshotRequest};

#[derive(Debug, Args)]
pub(super) struct SnapshotArgs {
    #[command(flatten)]
    vm: Vm,
    /// What to write; a file of that name is replaced once the new one is whole.
    file: PathBuf,
    /// End the VM once the file is whole, instead of letting the guest go on.
    #[arg(long)]
    stop: bool,
    /// Print one JSON object on standard output.
    #[arg(long)]
    json: bool,
}

impl SnapshotArgs {
    pub(super) fn write(&self) -> Outcome {
        let client = self.vm.connect()?;
        // The VM may have been started elsewhere.
        let file = std::path::absolute(&self.file)?;
        let request = Request::Snapshot(SnapshotRequest { file, stop: self.stop });
        let report = client.converse(&request, |_: Option<Progress>| true)?;
        self.report(report)
    }

    fn report(&self, report: MigrationReport) -> Outcome {
        if self.json {
            print(&format!("{}\n", json!(report)))?;
        } else if report.status == MigrationStatus::Completed {
            print(&told(&self.file, &report))?;
        }
        if report.status == MigrationStatus::Completed {
            return Ok(ExitCode::SUCCESS);
        }
        let error = report.error.unwrap_or_else(|| "the VM gave no reason".to_owned());
        complain(&format!("no snapshot, and the guest goes on: {}", cause::one_line(&error)));
        Ok(ExitCode::FAILURE)
    }
}

fn told(file: &Path, report: &MigrationReport) -> String {
    let MigrationReport { downtime_ms, bytes_sent, .. } = report;
    let mib = *bytes_sent as f64 / f64::from(1 << 20);
    format!("{}: {mib:.1} MiB, the guest stood still for {downtime_ms:.0} ms\n", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_told_with_its_size_and_what_it_cost_the_guest() {
        let report = MigrationReport {
            downtime_ms: 12.0,
            bytes_sent: 65 << 19,
            ..MigrationReport::not_started(String::new())
        };
        let told = told(Path::new("web.snap"), &report);
        assert_eq!(told, "web.snap: 32.5 MiB, the guest stood still for 12 ms\n");
    }
}
