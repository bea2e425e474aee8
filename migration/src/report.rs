//! What a migration did and what it cost.

use std::time::Duration;

use serde::Serialize;

use crate::policy::Outcome;

/// How it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The guest runs at the destination; or the peer agreed, where only that was asked.
    Completed,
    /// The guest runs at the source.
    #[default]
    Failed,
    /// As failed, because someone wished so.
    Cancelled,
    /// The guest is stopped at the source, and may be running at the destination.
    Undecided,
}

/// What became of an assigned device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its name in the machine.
    pub id: String,
    /// The way it was moved.
    pub strategy: String,
    /// How long the guest was without it, in milliseconds.
    pub paused_ms: u64,
}

/// What a migration did and what it cost, seen from one side.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// Why, where it did not complete: one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// From the first byte to the end, in milliseconds.
    pub total_ms: u64,
    /// From the stop of the vCPUs until they were known to run again, in milliseconds.
    ///
    /// The destination, which sees only the last part of it, tells from the end of the last pass
    /// over memory until they ran.
    pub downtime_ms: u64,
    /// Connections that memory flowed over.
    pub streams: u8,
    /// Passes over memory, the last one included.
    pub rounds: u32,
    /// How the copying ended while the guest ran; none if it never came to that.
    pub outcome: Option<Outcome>,
    /// For how much of the time the vCPU was kept from running that was slowed down most, in
    /// percent, when it was most.
    pub throttled_percent: u8,
    /// For how much each vCPU was then; empty if all were alike.
    pub throttled_vcpus: Vec<u8>,
    /// Bytes on the wire, of memory and of everything else.
    pub bytes_sent: u64,
    /// `bytes_sent` over the time spent copying, in MiB per second.
    pub throughput_mib_s: f64,
    /// Pages sent with their content; a page counts each time.
    pub pages: u64,
    /// Pages of which only was told that they are zero.
    pub zero_pages: u64,
    /// Bytes of device and vCPU state.
    pub state_bytes: u64,
    /// The assigned devices.
    pub devices: Vec<Device>,
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
