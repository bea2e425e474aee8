//! The place of the serial device: machines come and go, the console stays.

use std::sync::{Arc, Mutex, PoisonError};

use devices::legacy::serial::Serial;

/// Where the console's input goes: to the machine that is here now.
#[derive(Clone, Default)]
pub(super) struct SerialSeat(Arc<Mutex<Option<Arc<Serial>>>>);

impl SerialSeat {
    /// Connects the console to a machine's serial device, or to none.
    pub(super) fn set(&self, serial: Option<Arc<Serial>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = serial;
    }

    /// Hands input to the guest; returns how many bytes it took. With no guest it takes none.
    pub(super) fn type_in(&self, bytes: &[u8]) -> usize {
        let serial = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        serial.map_or(0, |serial| serial.receive(bytes))
    }
}
