//! Having the guest write what its devices wrote, so that KVM's log tells of it.

use std::time::{Duration, Instant};

use migration::plan::{Meanwhile, Step, StepFailure};

use super::Moving;

/// How long a guest may take to begin what it promised.
const BEGINS: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(20);

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
        while !slots.block().promise_is_kept() {
            let broken = !slots.block().dirtying_active || Instant::now() > deadline;
            let failed =
                if broken { Err("the guest promised it and does not".into()) } else { meanwhile() };
            if failed.is_err() {
                slots.want_dirtying(false);
                return failed;
            }
            let _ = slots.wait(slots.changes(), Instant::now() + TICK);
        }
        Ok(())
    }

    fn undo(&mut self) {
        self.0.slots().want_dirtying(false);
    }
}
