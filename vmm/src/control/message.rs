//! The messages of the control socket.

use std::collections::BTreeMap;
use std::path::PathBuf;

use migration::policy::NoConvergence;
use migration::wire::Compression;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::slot::SlotInfo;
use crate::config::{Address, DeviceConfig, DeviceId, SerialMode, VmName};

/// The longest line either side accepts, in bytes, its newline included.
pub const LINE_MAX: usize = 64 << 10;

/// What can be asked of a running VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What it is and how it does: answered by [`Info`].
    Info {},
    /// Stop all vCPUs. Answered by `null` when they stand; no error if they did already.
    Pause {},
    /// Let them run again. Answered by `null`.
    Resume {},
    /// End the VM. Answered by `null` when the guest was asked, not when it has followed.
    Stop {
        /// Do not press the power button: end it at once.
        #[serde(default)]
        force: bool,
    },
    /// Move the guest. Answered by [`MigrationReport`], or by [`DryRun`].
    Migrate(MigrateRequest),
    /// Write the guest to a file. Answered by [`MigrationReport`], whose status is `completed` once
    /// the file is whole.
    Snapshot(SnapshotRequest),
    /// Give up the migration or snapshot that is under way. Answered by `null` when it was told so; the
    /// client that started it gets its outcome.
    Cancel {},
    /// Show or decide a migration whose outcome is not known. Answered by [`Undecided`] or
    /// `null`.
    Resolve {
        /// What to do; `None` only shows it.
        #[serde(default)]
        decision: Option<Decision>,
    },
    /// Give the guest a device. Answered by the number of the slot once the guest uses it.
    Plug {
        /// Which.
        device: DeviceConfig,
        /// How long the guest may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Take a device from the guest. Answered by the number of the slot once the host has it back.
    Unplug {
        /// Which.
        id: DeviceId,
        /// How long the guest may take, in milliseconds.
        timeout_ms: u64,
    },
}

/// How a guest is to be moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The `uvmm run --incoming` that waits for it.
    pub to: Address,
    /// Only agree with the peer and answer what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// How many connections carry memory; `None` leaves it to the VM.
    #[serde(default)]
    pub streams: Option<u8>,
    /// The longest pause to aim at, in milliseconds.
    pub downtime_limit_ms: u64,
    /// What to do about a guest for which that is never enough.
    #[serde(default)]
    pub on_no_convergence: NoConvergence,
    /// The most bytes to send in a second; `None` for no limit.
    #[serde(default)]
    pub bandwidth_limit: Option<u64>,
    /// Pass the memory itself to a peer on this host, instead of what is in it.
    #[serde(default)]
    pub shared_memory: bool,
    /// Send a checksum with all memory.
    #[serde(default)]
    pub checksums: bool,
    /// What memory is packed with.
    #[serde(default)]
    pub compress: Compression,
    /// How long to ask a peer that fell silent who has the guest, in milliseconds; `None` leaves it
    /// to the VM.
    #[serde(default)]
    pub undecided_after_ms: Option<u64>,
}

/// How a guest is to be written to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// An absolute path. A file that is there is replaced once the new one is whole.
    pub file: PathBuf,
    /// End the VM then.
    #[serde(default)]
    pub stop: bool,
}

/// What an operator decides about a guest that stands still after a migration whose outcome
/// is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Run the guest here: right only if the destination does not and never will.
    RunHere,
    /// End it here: right only if the destination runs it.
    Discard,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The guest runs.
    Running,
    /// Its vCPUs stand, because someone asked for it.
    Paused,
    /// It is on its way to another host; it runs until the last phase.
    Migrating,
    /// It waits for a guest or receives one.
    Incoming,
    /// It stands, because it may run elsewhere: see `uvmm resolve`.
    Undecided,
}

/// The answer to [`Request::Info`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// The VM's name.
    pub name: VmName,
    /// What it is doing.
    pub state: State,
    /// The number of vCPUs.
    pub cpus: u8,
    /// What processors they are; empty if the VM's uvmm does not tell.
    #[serde(default)]
    pub cpu: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The process that runs it.
    pub pid: u32,
    /// Milliseconds since that process began.
    pub uptime_ms: u64,
    /// Where its first serial line is connected.
    pub serial: SerialMode,
    /// Where it waits for a guest, with the port that it really listens on.
    pub incoming: Option<Address>,
    /// The migration under way, in either direction.
    pub migration: Option<Progress>,
    /// Its slots for devices that come and go.
    #[serde(default)]
    pub slots: Vec<SlotInfo>,
    /// What it counted, by name: exits, dirty pages, ….
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

/// How far a migration is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, in a word or two: `agreeing`, `copying`, `switching over`.
    pub phase: String,
    /// The step of the plan that is under way, as `migrate --dry-run` calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// The pass over memory, counted from 0.
    pub round: u32,
    /// Bytes of guest memory dealt with in this round.
    pub round_bytes: u64,
    /// Bytes of guest memory that this round has to deal with.
    pub round_total: u64,
    /// Bytes on the wire since the beginning.
    pub bytes_sent: u64,
    /// The rate over the last moments, in MiB per second.
    pub throughput_mib_s: f64,
    /// Milliseconds since the beginning.
    pub elapsed_ms: u64,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// The guest runs at the destination.
    Completed,
    /// It runs at the source as if nothing had happened.
    Failed,
    /// The same, because someone asked for it.
    Cancelled,
    /// It stands at the source and may run at the destination: see `uvmm resolve`.
    Undecided,
}

/// What a migration came to: the object that `uvmm migrate --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// How it ended.
    pub status: MigrationStatus,
    /// Why it did not complete, with its causes, on one line.
    pub error: Option<String>,
    /// Milliseconds from the request to the end.
    pub total_ms: f64,
    /// Milliseconds that no vCPU ran anywhere.
    pub downtime_ms: f64,
    /// Passes over memory, the last one with the guest stopped included.
    pub rounds: u32,
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// `bytes_sent` over the time it was sent in.
    pub throughput_mib_s: f64,
    /// What became of each assigned device.
    pub devices: Vec<DeviceReport>,
    /// Anything else that the VM reports.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

impl MigrationReport {
    /// The report of a migration that did not begin.
    #[must_use]
    pub fn not_started(error: String) -> Self {
        MigrationReport {
            status: MigrationStatus::Failed,
            error: Some(error),
            total_ms: 0.0,
            downtime_ms: 0.0,
            rounds: 0,
            bytes_sent: 0,
            throughput_mib_s: 0.0,
            devices: Vec::new(),
            more: BTreeMap::new(),
        }
    }
}

/// How one assigned device was moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Its `id=`.
    pub id: String,
    /// How it was moved: `native`, `pause`, `evict`, ….
    pub strategy: String,
    /// Milliseconds that the guest had to do without it.
    pub paused_ms: f64,
}

/// What a migration would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DryRun {
    /// The peer that agreed to it.
    pub to: Address,
    /// How each assigned device would move.
    #[serde(default)]
    pub devices: Vec<PlannedDevice>,
    /// The plan's steps in the order in which they would be entered.
    pub plan: Vec<PlannedStep>,
}

/// How an assigned device would move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedDevice {
    /// Its `id=`.
    pub id: String,
    /// How it would be moved: `pause`, `evict`, ….
    pub strategy: String,
    /// Why so.
    pub why: String,
    /// What would make a better way possible.
    pub better: Option<String>,
}

/// One step of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// The phase that enters it.
    pub phase: String,
    /// What it does.
    pub step: String,
}

/// A migration whose outcome the source does not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undecided {
    /// The name of this migration, in hexadecimal.
    pub token: String,
    /// Where the guest may be running.
    pub to: Address,
    /// Seconds since the guest was stopped here.
    pub stopped_s: u64,
}

/// Why a line is not a request.
#[derive(Debug, Error)]
pub enum RequestError {
    /// The client went on for too long.
    #[error("a request is one line of at most {LINE_MAX} bytes")]
    TooLong,
    /// Not JSON, or not one of the commands.
    #[error("not a request of this version of uvmm")]
    Malformed(#[source] serde_json::Error),
}

impl Request {
    /// Reads one line, with or without its newline.
    ///
    /// # Errors
    /// [`RequestError`]; whatever the bytes are, nothing else happens.
    pub fn parse(line: &[u8]) -> Result<Self, RequestError> {
        if line.len() > LINE_MAX {
            return Err(RequestError::TooLong);
        }
        serde_json::from_slice(line).map_err(RequestError::Malformed)
    }
}

/// One line from the VM to the client.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply<P, R> {
    /// More will follow.
    Progress(P),
    /// It was done.
    Result(R),
    /// It was not, and this is why.
    Error(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_look_as_documented() {
        for (line, request) in [
            (r#"{"command":"info"}"#, Request::Info {}),
            (r#"{"command":"stop"}"#, Request::Stop { force: false }),
            (r#"{"command":"stop","force":true}"#, Request::Stop { force: true }),
            (
                r#"{"command":"resolve","decision":"run-here"}"#,
                Request::Resolve { decision: Some(Decision::RunHere) },
            ),
            (
                r#"{"command":"migrate","to":"tcp:h:1","downtime_limit_ms":300}"#,
                Request::Migrate(MigrateRequest {
                    to: "h:1".parse().unwrap(),
                    dry_run: false,
                    streams: None,
                    downtime_limit_ms: 300,
                    on_no_convergence: NoConvergence::Stop,
                    bandwidth_limit: None,
                    shared_memory: false,
                    checksums: false,
                    compress: Compression::None,
                    undecided_after_ms: None,
                }),
            ),
            (
                r#"{"command":"snapshot","file":"/s"}"#,
                Request::Snapshot(SnapshotRequest { file: "/s".into(), stop: false }),
            ),
            (
                r#"{"command":"unplug","id":"net0","timeout_ms":9}"#,
                Request::Unplug { id: "net0".parse().unwrap(), timeout_ms: 9 },
            ),
            (
                r#"{"command":"plug","device":{"type":"vfio","id":"n","host":"01:10.0"},"timeout_ms":9}"#,
                Request::Plug {
                    device: "vfio,id=n,host=0000:01:10.0".parse().unwrap(),
                    timeout_ms: 9,
                },
            ),
        ] {
            assert_eq!(Request::parse(line.as_bytes()).unwrap(), request, "{line}");
        }
    }

    #[test]
    fn an_unknown_command_or_field_is_refused_rather_than_ignored() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"command":"destroy"}"#,
            r#"{"command":"stop","forced":true}"#,
            r#"{"command":"info","x":1}"#,
            r#"{"command":"migrate","to":"h:1","downtime_limit_ms":3,"bandwith_limit":1}"#,
            r#"{"command":"migrate","to":"nowhere","downtime_limit_ms":3}"#,
            r#"{"command":"info"} {"command":"info"}"#,
            r#"{"command":"unplug","id":"/","timeout_ms":9}"#,
            r#"{"command":"plug","device":"vfio,id=n,host=01:10.0","timeout_ms":9}"#,
        ] {
            let error = Request::parse(line.as_bytes()).unwrap_err();
            assert!(matches!(error, RequestError::Malformed(_)), "{line}");
        }
        let long = Request::parse(&vec![b' '; LINE_MAX + 1]).unwrap_err();
        assert!(matches!(long, RequestError::TooLong));
    }

    fn requests() -> impl Strategy<Value = Request> {
        let migrate = (any::<[bool; 3]>(), any::<Option<u8>>(), any::<u64>(), any::<Option<u64>>());
        prop_oneof![
            Just(Request::Info {}),
            Just(Request::Cancel {}),
            any::<bool>().prop_map(|force| Request::Stop { force }),
            ("/[a-z ]{0,9}", any::<bool>()).prop_map(|(file, stop)| {
                Request::Snapshot(SnapshotRequest { file: file.into(), stop })
            }),
            Just(Request::Resolve { decision: None }),
            any::<(u8, u64)>().prop_map(|(number, timeout_ms)| Request::Unplug {
                id: format!("net{number}").parse().unwrap(),
                timeout_ms,
            }),
            any::<(Option<bool>, u64)>().prop_map(|(slot, timeout_ms)| Request::Plug {
                device: DeviceConfig {
                    slot: slot.map(u8::from).map(|slot| slot + 1),
                    .."vfio,id=n,host=01:10.0,strategy=evict".parse().unwrap()
                },
                timeout_ms,
            }),
            Just(Request::Resolve { decision: Some(Decision::Discard) }),
            migrate.prop_map(|(flags, streams, downtime_limit_ms, bandwidth_limit)| {
                let [dry_run, shared_memory, checksums] = flags;
                let to = "[::1]:1".parse().unwrap();
                Request::Migrate(MigrateRequest {
                    to,
                    dry_run,
                    streams,
                    downtime_limit_ms,
                    on_no_convergence: NoConvergence::Throttle,
                    bandwidth_limit,
                    shared_memory,
                    checksums,
                    compress: Compression::Zstd,
                    undecided_after_ms: bandwidth_limit,
                })
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_request_survives_being_written_and_read(request in requests()) {
            let line = serde_json::to_vec(&request).unwrap();
            prop_assert_eq!(Request::parse(&line).unwrap(), request);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(line: Vec<u8>) {
            let _ = Request::parse(&line);
        }

        #[test]
        fn no_json_makes_the_parser_panic(
            line in r#"\{"command":"(migrate|snapshot|stop|resolve|plug|unplug)","[a-z_]{1,9}":(null|-?[0-9]{1,30}|"[^"]{0,9}"|\[\[|\{\})\}"#
        ) {
            let _ = Request::parse(line.as_bytes());
        }
    }
}
