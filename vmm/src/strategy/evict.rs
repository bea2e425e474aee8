//! Unplugging devices by the button of their slots, and plugging them in again where the guest
//! stays.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::shpc::{Led, Slots, State};
use migration::plan::{Meanwhile, Step, StepFailure};

use super::{Moving, Way};
use crate::cause;
use crate::config::DeviceId;
use crate::hotplug::{Asking, put_in, take_back};

/// How long a guest may take to let go of a device, or to take it again.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest that works on a slot may take to come to an end of it.
const WORKING: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(20);

/// Unplugs the devices that move in one way.
pub(crate) struct Evict {
    moving: Moving,
    way: Way,
    /// Those that were.
    out: Vec<(DeviceId, u8)>,
}

impl Evict {
    /// Of the devices of `moving`, those that move in this way.
    pub(crate) fn new(moving: Moving, way: Way) -> Self {
        Self { moving, way, out: Vec::new() }
    }
}

impl Step for Evict {
    fn name(&self) -> String {
        format!("unplug {}", Moving::names(&self.moving.by(self.way)))
    }

    fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        self.out = self.moving.by(self.way);
        evict(&self.moving, &self.out, meanwhile)?;
        if self.way == Way::EvictEarly {
            return Ok(());
        }
        self.moving.check_promise().inspect_err(|_| give_back(&self.moving, &self.out))
    }

    fn took_long(&self) -> bool {
        true
    }

    fn undo(&mut self) {
        give_back(&self.moving, &self.out);
    }
}

/// Has the guest let go of `devices`, all at once. On an error it has all of them.
pub(super) fn evict(
    moving: &Moving,
    devices: &[(DeviceId, u8)],
    meanwhile: &mut Meanwhile<'_>,
) -> Result<(), StepFailure> {
    let mut stopped = Ok(());
    let results = at_once(devices, &mut stopped, meanwhile, |(id, slot), stop| {
        let tell = &mut |_| {};
        let asking = Asking::new(moving.slots(), *slot, Instant::now() + PATIENCE, stop, tell);
        let function = take_back(asking).map_err(|(error, _)| cause::chain(&error))?;
        moving.is_away(id);
        moving.keep(id, function);
        Ok(())
    });
    let refused = results.into_iter().find_map(Result::err);
    match stopped.and(refused.map_or(Ok(()), |why: String| Err(why.into()))) {
        Ok(()) => Ok(()),
        Err(error) => {
            give_back(moving, devices);
            Err(error)
        }
    }
}

/// Gives the guest those of `devices` that it has not, all at once.
pub(super) fn give_back(moving: &Moving, devices: &[(DeviceId, u8)]) {
    let mut unstopped = Ok(());
    at_once(devices, &mut unstopped, &mut || moving.check_power(), |(id, slot), stop| {
        let function = moving.take(id).or_else(|| half_done(moving.slots(), *slot));
        let Some(function) = function else { return };
        let tell = &mut |_| {};
        let asking = Asking::new(moving.slots(), *slot, Instant::now() + PATIENCE, stop, tell);
        match put_in(asking, function) {
            Ok(()) => moving.is_back(id.as_str()),
            Err((error, _)) => {
                let error = cause::chain(&error);
                tracing::error!(%id, error, "cannot give the guest its device back: plug it in");
            }
        }
    });
}

/// A card whose guest was at work on it when it was to stop: waits for the end of that, and takes
/// the card if the guest let go of it.
fn half_done(slots: &Slots, slot: u8) -> Option<Arc<dyn PciFunction>> {
    let deadline = Instant::now() + WORKING;
    loop {
        let view = slots.status(slot).ok().filter(|status| status.view.card)?.view;
        match (view.state, view.power) {
            (State::Enabled, Led::On) => return None,
            (State::Disabled, Led::Off) => return slots.take_out(slot).ok(),
            _ if Instant::now() > deadline => return None,
            _ => thread::sleep(TICK),
        }
    }
}

/// Does `work` with each of `devices` on a thread of its own. What `meanwhile` fails with stops
/// them and is told in `stopped`.
fn at_once<T: Send>(
    devices: &[(DeviceId, u8)],
    stopped: &mut Result<(), StepFailure>,
    meanwhile: &mut Meanwhile<'_>,
    work: impl Fn(&(DeviceId, u8), &AtomicBool) -> T + Sync,
) -> Vec<T> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (work, stop) = (&work, &stop);
        let start = |device: &'_ (DeviceId, u8)| {
            let device = device.clone();
            let name = format!("slot-{}", device.1);
            thread::Builder::new().name(name).spawn_scoped(scope, move || work(&device, stop))
        };
        let threads: Vec<_> = devices.iter().map(start).collect();
        let running = |thread: &std::io::Result<thread::ScopedJoinHandle<'_, T>>| {
            thread.as_ref().is_ok_and(|thread| !thread.is_finished())
        };
        while threads.iter().any(running) {
            if stopped.is_ok() {
                *stopped = meanwhile();
                stop.store(stopped.is_err(), Ordering::Relaxed);
            }
            thread::sleep(TICK);
        }
        let mut results = Vec::new();
        for thread in threads {
            match thread.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(result)) => results.push(result),
                Ok(Err(_)) | Err(_) => *stopped = Err("cannot run a thread".into()),
            }
        }
        results
    })
}
