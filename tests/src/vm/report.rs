//! What `uvmm migrate --json` says.
use std::io::Read;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::error::{Context, Error, Result};

/// The report of a migration.
#[derive(Debug, Deserialize)]
pub struct Report {
    /// `completed`, `failed`, `cancelled` or `undecided`.
    pub status: String,
    /// What went wrong.
    pub error: Option<String>,
    /// From the request to the end.
    pub total_ms: f64,
    /// How long the guest ran nowhere.
    pub downtime_ms: f64,
    /// Passes over memory while the guest ran.
    pub rounds: u32,
    /// `converged`, `throttled`, `forced` or `gave-up`; none if it never came to that.
    pub outcome: Option<String>,
    /// What went through the connection.
    pub bytes_sent: u64,
    /// While it moved memory.
    pub throughput_mib_s: f64,
    /// For how much of the time each vCPU was kept from running, in percent.
    #[serde(default)]
    pub throttled_vcpus: Vec<u8>,
    /// The assigned devices.
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// How an assigned device was moved.
#[derive(Debug, Deserialize)]
pub struct Device {
    /// Its `id=`.
    pub id: String,
    /// `pause`, `evict`, ….
    pub strategy: String,
    /// How long the guest was without it.
    pub paused_ms: f64,
}

impl Report {
    /// How each device moved, in the order of their names, as `net0=pause`.
    #[must_use]
    pub fn ways(&self) -> Vec<String> {
        let mut ways: Vec<_> = self
            .devices
            .iter()
            .map(|device| format!("{}={}", device.id, device.strategy))
            .collect();
        ways.sort();
        ways
    }

    /// Waits for `uvmm migrate --json` and reads its report.
    ///
    /// # Errors
    /// If it takes too long, prints no report, or its exit status contradicts the report.
    pub fn of(child: Child, limit: Duration) -> Result<Self> {
        let (status, printed, errors) = finish(child, limit)?;
        let report: Self = serde_json::from_str(&printed).map_err(|error| {
            Error::Guest(format!("no report in {printed:?} ({error}); stderr: {}", errors.trim()))
        })?;
        if status.success() != (report.status == "completed") {
            return Err(Error::Guest(format!("exit status {status} with {report:?}")));
        }
        Ok(report)
    }
}

/// Waits for a process whose output is piped.
pub(super) fn finish(mut child: Child, limit: Duration) -> Result<(ExitStatus, String, String)> {
    let output = child.stdout.take().map(collect).transpose()?;
    let errors = child.stderr.take().map(collect).transpose()?;
    let Some(status) = wait(&mut child, limit)? else {
        drop((child.kill(), child.wait()));
        return Err(Error::Timeout(format!("uvmm did not end in {limit:.0?}")));
    };
    let text = |reader: Option<thread::JoinHandle<String>>| {
        reader.map(|reader| reader.join().unwrap_or_default()).unwrap_or_default()
    };
    Ok((status, text(output), text(errors)))
}

fn collect(mut stream: impl Read + Send + 'static) -> Result<thread::JoinHandle<String>> {
    let read = move || {
        let mut bytes = Vec::new();
        drop(stream.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    };
    thread::Builder::new()
        .name("output".into())
        .spawn(read)
        .context(|| "cannot start a thread".into())
}

/// Waits for a process; none if it does not end in time.
pub(super) fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        let ended = child.try_wait().context(|| "cannot wait for uvmm".into())?;
        if ended.is_some() || Instant::now() > deadline {
            return Ok(ended);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
