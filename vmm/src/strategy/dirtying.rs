//! Having the guest write what its devices wrote, so that KVM's log tells of it.

use std::time::{Duration, Instant};

use devices::pci::bridge::BlockView;
use migration::plan::{Meanwhile, Step, StepFailure};

use super::Moving;
use crate::block::wait_until;

/// How long a guest may take to begin what it promised.
const BEGINS: Duration = Duration::from_secs(10);

/// Has the guest keep its promise: whatever a device writes, a CPU writes as well.
pub(crate) struct WantDirtying(pub(crate) Moving);

impl Step for WantDirtying {
    fn name(&self) -> String {
        "have the guest write whatever its devices write".to_owned()
    }

    fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        let slots = self.0.slots();
        slots.want_dirtying(true);
        let deadline = Instant::now() + BEGINS;
        let decided = |block: &BlockView| block.promise_is_kept() || !block.dirtying_active;
        let waited = wait_until(slots, deadline, decided, meanwhile);
        let failed = match waited {
            Ok(_) if slots.block().promise_is_kept() => return Ok(()),
            Ok(_) => "the guest promised it and does not".into(),
            Err(failed) => failed,
        };
        slots.want_dirtying(false);
        Err(failed)
    }

    fn undo(&mut self) {
        self.0.slots().want_dirtying(false);
    }
}
