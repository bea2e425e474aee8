//! `uvmm migrate`: start a migration, watch it, say what it came to.

use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use migration::policy::NoConvergence;
use migration::wire::Compression;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::{Failure, Outcome, Vm, complain, duration, print};
use crate::cause;
use crate::config::{Address, AddressError, Size, SizeError, VmName};
use crate::control::{
    Client, ClientError, DryRun, MigrateRequest, MigrationReport, MigrationStatus, PlannedDevice,
    Progress, Request, RuntimeDir,
};
use crate::progress::{self, Display};

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    vm: Vm,
    /// Where `uvmm run --incoming` waits for the guest: HOST:PORT or unix:PATH.
    #[arg(long, value_name = "HOST:PORT", value_parser = destination)]
    to: Address,
    /// Only agree with the destination, and print the plan.
    #[arg(long)]
    dry_run: bool,
    /// How many connections carry memory, 1 to 16 [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    streams: Option<u8>,
    /// The longest pause to aim at.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = duration::parse)]
    downtime_limit: Duration,
    /// What to do about a guest that writes too fast for that: slow its vCPUs down, stop it for
    /// longer, or let it stay.
    #[arg(long, value_name = "WAY", default_value = "stop", value_parser = ways())]
    on_no_convergence: NoConvergence,
    /// The most to send in a second, such as 100M or 1G (bytes) [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    bandwidth_limit: Option<Size>,
    /// Pass the memory itself to a VM that waits on this host, at unix:PATH: takes no longer for more
    /// memory.
    #[arg(long, conflicts_with_all = ["streams", "bandwidth_limit"])]
    shared_memory: bool,
    /// Send a checksum with all memory, for a wire whose own are not to be trusted.
    #[arg(long, conflicts_with = "shared_memory")]
    checksums: bool,
    /// Pack memory, for a wire that is slower than the processors here and there; auto finds out what
    /// is the fastest.
    #[arg(long, value_name = "WITH", default_value = "none", value_parser = packings())]
    #[arg(conflicts_with = "shared_memory")]
    compress: Compression,
    /// How long to ask a destination that falls silent in the last moment who has the guest, 100s at
    /// most: an operator decides then [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = asking)]
    undecided_after: Option<Duration>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    json: bool,
}

fn destination(text: &str) -> Result<Address, String> {
    match text.parse() {
        Ok(Address::Tcp { port: 0, .. }) => Err("port 0 cannot be connected to".to_owned()),
        address => address.map_err(|e: AddressError| e.to_string()),
    }
}

/// A destination answers for somewhat longer than this.
const LONGEST_ASKING: Duration = Duration::from_secs(100);

fn asking(text: &str) -> Result<Duration, String> {
    match duration::parse(text) {
        Ok(limit) if limit > LONGEST_ASKING => {
            Err(format!("no destination answers for longer than {LONGEST_ASKING:?}"))
        }
        limit => limit,
    }
}

fn ways() -> impl TypedValueParser<Value = NoConvergence> {
    PossibleValuesParser::new(NoConvergence::NAMES).try_map(|name| name.parse::<NoConvergence>())
}

fn packings() -> impl TypedValueParser<Value = Compression> {
    PossibleValuesParser::new(Compression::NAMES).try_map(|name| name.parse::<Compression>())
}

fn rate(text: &str) -> Result<Size, String> {
    match text.parse() {
        Ok(Size(0)) => Err("0 would never send anything: leave the limit out for none".to_owned()),
        size => size.map_err(|e: SizeError| e.to_string()),
    }
}

impl MigrateArgs {
    pub(super) fn migrate(&self) -> Outcome {
        match self.start() {
            Err(error) if self.json => {
                let failed = MigrationReport::not_started(cause::chain(&*error));
                print(&format!("{}\n", json!(failed)))?;
                Err(error)
            }
            outcome => outcome,
        }
    }

    fn start(&self) -> Outcome {
        let client = self.vm.connect()?;
        let limit = self.undecided_after.map(|limit| u64::try_from(limit.as_millis()));
        let limit = limit.transpose()?;
        let request = Request::Migrate(MigrateRequest {
            to: self.to.clone(),
            dry_run: self.dry_run,
            streams: self.streams,
            downtime_limit_ms: u64::try_from(self.downtime_limit.as_millis())?,
            on_no_convergence: self.on_no_convergence,
            bandwidth_limit: self.bandwidth_limit.map(|Size(bytes)| bytes),
            shared_memory: self.shared_memory,
            checksums: self.checksums,
            compress: self.compress,
            undecided_after_ms: limit,
        });
        let mut watch = Watch::begin(client.name())?;
        if self.dry_run {
            let plan: DryRun = client.converse(&request, |_: Option<Progress>| watch.goes_on())?;
            return print(&if self.json { format!("{}\n", json!(plan)) } else { page(&plan) });
        }
        let mut display = Display::new(&self.to);
        let outcome = client.converse(&request, |progress| {
            if let Some(progress) = progress {
                display.show(&progress);
            }
            watch.goes_on()
        });
        display.end();
        self.report(outcome_of(outcome)?)
    }

    fn report(&self, report: MigrationReport) -> Outcome {
        if self.json {
            print(&format!("{}\n", json!(report)))?;
        } else if report.status == MigrationStatus::Completed {
            print(&progress::report(&report))?;
        }
        let error = report.error.unwrap_or_else(|| "the VM gave no reason".to_owned());
        let end = match report.status {
            MigrationStatus::Completed => return Ok(ExitCode::SUCCESS),
            MigrationStatus::Failed => "the migration failed and the guest goes on here",
            MigrationStatus::Cancelled => "the migration was cancelled and the guest goes on here",
            MigrationStatus::Undecided => "the migration is undecided, see `uvmm resolve`",
        };
        complain(&format!("{end}: {}", cause::one_line(&error)));
        Ok(ExitCode::FAILURE)
    }
}

/// A VM that went silent or away in the middle leaves the outcome open.
fn outcome_of(
    outcome: Result<MigrationReport, ClientError>,
) -> Result<MigrationReport, ClientError> {
    match outcome {
        Err(
            error @ (ClientError::Closed { .. }
            | ClientError::Broken { .. }
            | ClientError::Abandoned { .. }),
        ) => Ok(MigrationReport {
            status: MigrationStatus::Undecided,
            ..MigrationReport::not_started(cause::chain(&error))
        }),
        outcome => outcome,
    }
}

fn page(DryRun { to, devices, plan }: &DryRun) -> String {
    let mut page = format!("{to} agrees. What would be done, in this order:\n");
    let width = plan.iter().map(|step| step.phase.len()).max().unwrap_or(0);
    for step in plan {
        writeln!(page, "  {:width$}  {}", step.phase, step.step).expect("a string takes it");
    }
    for PlannedDevice { id, strategy, why, better } in devices {
        writeln!(page, "{id}: {strategy}: {why}").expect("a string takes it");
        if let Some(better) = better {
            writeln!(page, "  better: {better}").expect("a string takes it");
        }
    }
    page
}

/// Turns Ctrl-C into a cancellation, and a second one into not waiting for it.
struct Watch {
    name: VmName,
    interrupted: Arc<AtomicBool>,
    cancelled: bool,
}

impl Watch {
    fn begin(name: &VmName) -> Result<Self, Failure> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, interrupted.clone())?;
        }
        Ok(Watch { name: name.clone(), interrupted, cancelled: false })
    }

    /// Whether to go on waiting.
    fn goes_on(&mut self) -> bool {
        if !self.interrupted.swap(false, Ordering::SeqCst) {
            return true;
        }
        if self.cancelled {
            return false;
        }
        self.cancelled = true;
        complain("cancelling; interrupt again to stop waiting");
        let cancel = RuntimeDir::open().map_err(ClientError::from).and_then(|dir| {
            Client::connect(&dir, Some(&self.name))?.ask::<()>(&Request::Cancel {})
        });
        if let Err(error) = cancel {
            complain(&cause::chain(&error));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_vanishes_in_the_middle_leaves_the_outcome_open() {
        let name: VmName = "web".parse().unwrap();
        let report = outcome_of(Err(ClientError::Closed { name: name.clone() })).unwrap();
        assert_eq!(report.status, MigrationStatus::Undecided);
        let refused = ClientError::Refused { name, why: "no".into() };
        assert!(outcome_of(Err(refused)).is_err(), "a refusal is plain failure");
    }

    #[test]
    fn the_report_has_the_promised_fields() {
        let report = json!(MigrationReport::not_started("why".into()));
        let mut fields: Vec<_> = report.as_object().unwrap().keys().collect();
        fields.sort();
        let promised = [
            "bytes_sent",
            "devices",
            "downtime_ms",
            "error",
            "rounds",
            "status",
            "throughput_mib_s",
            "total_ms",
        ];
        assert_eq!(fields, promised);
        assert_eq!(report["status"], "failed");
    }

    #[test]
    fn destinations_that_cannot_be_connected_to_are_refused() {
        assert!(destination("h:0").is_err());
        assert!(destination("h").is_err());
        assert_eq!(destination("h:1"), Ok("tcp:h:1".parse().unwrap()));
    }
}
