//! Having the guest's own drivers pause devices, through the migration block of their bridge.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use devices::pci::bridge::BlockView;
use migration::plan::{Meanwhile, Step, StepFailure};

use super::evict::{evict, give_back};
use super::{Moving, Way};
use crate::block::wait_until;
use crate::config::{DeviceId, OnTimeout};

/// How long a guest may take to pause all its devices, or to resume them.
const PATIENCE: Duration = Duration::from_secs(5);

/// Has the guest pause the devices that are to be paused; those that it does not pause are
/// unplugged instead, where the user allows that.
pub(crate) struct Pause {
    moving: Moving,
    evicted: Vec<(DeviceId, u8)>,
    /// The others run again meanwhile, to be paused once the guest's memory was sent again.
    interrupted: bool,
}

impl Pause {
    /// Of the devices of `moving`, those that are to be paused.
    pub(crate) fn new(moving: Moving) -> Self {
        Self { moving, evicted: Vec::new(), interrupted: false }
    }

    /// Evicts those that the guest does not pause, if the user lets them be evicted.
    fn evict_instead(
        &mut self,
        unpaused: Vec<(DeviceId, u8)>,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), StepFailure> {
        let names = Moving::names(&unpaused);
        let refused = self.moving.lock().iter().any(|passenger| {
            passenger.config.on_timeout == OnTimeout::Refuse
                && unpaused.iter().any(|(id, _)| *id == passenger.config.id)
        });
        if refused {
            let why = format!("the guest does not pause {names}, and on-timeout=refuse says so");
            return Err(why.into());
        }
        tracing::warn!("the guest does not pause {names}: unplugging instead");
        evict(&self.moving, &unpaused, meanwhile)?;
        for (id, _) in &unpaused {
            self.moving.instead(id, Way::EvictLate);
        }
        self.evicted.extend(unpaused);
        Ok(())
    }
}

impl Step for Pause {
    fn name(&self) -> String {
        format!("have the guest pause {}", Moving::names(&self.moving.by(Way::Pause)))
    }

    fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        self.moving.check_promise()?;
        let devices = self.moving.by(Way::Pause);
        let entered = pause(&self.moving, &devices, meanwhile).and_then(|unpaused| {
            self.moving.check_promise()?;
            self.interrupted = !unpaused.is_empty();
            if self.interrupted { self.evict_instead(unpaused, meanwhile) } else { Ok(()) }
        });
        entered.inspect_err(|_| self.undo())
    }

    fn took_long(&self) -> bool {
        self.interrupted
    }

    fn goes_on(&self) -> bool {
        self.interrupted && !self.moving.by(Way::Pause).is_empty()
    }

    fn undo(&mut self) {
        resume(&self.moving, &self.moving.by(Way::Pause));
        give_back(&self.moving, &self.evicted);
    }
}

/// Makes sure, once no vCPU runs, that the guest did not resume what it had paused.
pub(crate) struct StayPaused(pub(crate) Moving);

impl Step for StayPaused {
    fn name(&self) -> String {
        "see that what is paused stays so".to_owned()
    }

    fn enter(&mut self, _meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        self.0.check_promise()?;
        let numbers: Vec<u8> = self.0.by(Way::Pause).into_iter().map(|(_, slot)| slot).collect();
        let devices = self.0.slots().mask(&numbers)?;
        if devices & !self.0.slots().block().paused == 0 {
            Ok(())
        } else {
            Err("the guest resumed its devices too early (was its driver unloaded?)".into())
        }
    }

    fn undo(&mut self) {}
}

/// Asks the guest to pause `devices`; gives those that it did not. If there are any, none is
/// paused.
fn pause(
    moving: &Moving,
    devices: &[(DeviceId, u8)],
    meanwhile: &mut Meanwhile<'_>,
) -> Result<Vec<(DeviceId, u8)>, StepFailure> {
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    let slots = moving.slots();
    let numbers: Vec<u8> = devices.iter().map(|(_, slot)| *slot).collect();
    devices.iter().for_each(|(id, _)| moving.is_away(id));
    slots.ask_to_pause(&numbers)?;
    let answered = |block: &BlockView| {
        block.is_answered() || !block.wants_pause || !block.can_pause // it never will
    };
    let mut stopped = wait_until(slots, Instant::now() + PATIENCE, answered, meanwhile);
    let block = slots.block();
    if stopped.is_ok() && !block.wants_pause {
        stopped = Err("the guest was reset while it was asked".into());
    }
    let paused = |slot: u8| slots.mask(&[slot]).is_ok_and(|bit| block.paused & bit != 0);
    let unpaused: Vec<_> = devices.iter().filter(|(_, slot)| !paused(*slot)).cloned().collect();
    if stopped.is_err() || !unpaused.is_empty() {
        resume(moving, devices);
    }
    stopped.map(|_| unpaused)
}

/// Has the guest resume `devices`, and waits for that.
fn resume(moving: &Moving, devices: &[(DeviceId, u8)]) {
    moving.slots().let_resume();
    let deadline = Instant::now() + PATIENCE;
    let resumed =
        wait_until(moving.slots(), deadline, BlockView::is_resumed, || Ok::<_, Infallible>(()));
    let Ok(resumed) = resumed;
    if resumed {
        devices.iter().for_each(|(id, _)| moving.is_back(id.as_str()));
    } else {
        tracing::warn!("the guest does not say that its devices are resumed");
    }
}
