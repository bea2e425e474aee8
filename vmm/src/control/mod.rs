//! The control socket of a running VM: what can be asked of it, and what it answers.
//!
//! A connection carries one request. Both sides write JSON objects, one per line:
//!
//! ```text
//! client   {"command":"migrate","to":"tcp:10.0.0.2:4444", …}
//! VM       {"progress":{…}}         any number of times, for what takes a while
//! VM       {"result":…}             or {"error":"…"}: exactly once, then it closes
//! ```

mod client;
mod message;
mod replier;
mod runtime_dir;
mod server;
mod slot;
mod state_dir;
#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use message::{
    Decision, DeviceReport, DryRun, Info, LINE_MAX, MigrateRequest, MigrationReport,
    MigrationStatus, PlannedDevice, PlannedStep, Progress, Request, RequestError, SnapshotRequest,
    State, Undecided,
};
pub use replier::Replier;
pub use runtime_dir::{Claim, RuntimeDir, RuntimeDirError};
pub use server::{Call, Server, ServerError};
pub use slot::{Light, Power, SlotInfo, SlotProgress, SlotStage};
pub use state_dir::{StateDir, StateDirError};
