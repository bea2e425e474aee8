//! Where a migration is, for whoever watches.

use crate::patience::Cancel;
use crate::record::{NoRecord, Record};

/// What is going on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// The destination builds the machine.
    #[default]
    Preparing,
    /// The guest runs, its memory is copied.
    Copying,
    /// The guest runs, and is asked to let go of devices.
    Releasing,
    /// The guest stands still.
    Stopped,
    /// The guest was given away, the answer is due.
    HandingOver,
}

/// Where a migration is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// The step of the plan that is under way; none between steps.
    pub step: Option<String>,
    /// The pass over memory, from 1.
    pub round: u32,
    /// Bytes of guest memory that this pass is about.
    pub round_bytes: u64,
    /// How many of them are done.
    pub round_done: u64,
    /// Bytes on the wire so far.
    pub bytes_sent: u64,
    /// For how much of the time the vCPU is kept from running that is slowed down most, in percent.
    pub throttled_percent: u8,
}

/// Who watches a migration, may stop it, and writes its decisions down.
pub struct Watch<'a> {
    /// Is told at every frame: be quick.
    pub progress: &'a mut dyn FnMut(&Progress),
    /// Stops it, until the guest is given away.
    pub cancel: Cancel,
    /// Survives this process.
    pub record: Box<dyn Record>,
}

impl Watch<'_> {
    /// Takes the record, which serves one migration.
    pub(crate) fn take_record(&mut self) -> Box<dyn Record> {
        std::mem::replace(&mut self.record, Box::new(NoRecord))
    }
}
