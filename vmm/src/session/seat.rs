//! The place of the machine: machines come and go, the console and the host's clock stay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::machine::{HostEnds, Machine};

/// The machine that is here now, for those that are turned to any machine.
#[derive(Clone, Default)]
pub(super) struct Seat(Arc<Mutex<Option<HostEnds>>>);

impl Seat {
    /// Puts a machine here.
    pub(super) fn take(&self, machine: &Machine) {
        *self.lock() = Some(machine.host_ends().clone());
    }

    /// Leaves it empty.
    pub(super) fn leave(&self) {
        *self.lock() = None;
    }

    /// Hands input to the guest; returns how many bytes it took. With no guest it takes none.
    pub(super) fn type_in(&self, bytes: &[u8]) -> usize {
        self.here().map_or(0, |ends| ends.com1.push(bytes))
    }

    /// Lets the real-time clock interrupt; returns how long until it must be asked again.
    pub(super) fn tick(&self) -> Option<Duration> {
        self.here().and_then(|ends| ends.rtc.poll())
    }

    fn here(&self) -> Option<HostEnds> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<HostEnds>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
