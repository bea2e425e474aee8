//! The reset control register at port 0xcf9.

use std::sync::{Arc, Mutex, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::Power;
use crate::bus::BusDevice;

/// The port. FADT's `RESET_REG` names it, with `RESET_CPU | SYSTEM_RESET` as the value.
pub const PORT: u64 = 0xcf9;

/// Bit 1: the reset is a hard one. There is no difference here.
pub const SYSTEM_RESET: u8 = 1 << 1;
/// Bit 2: its rising edge resets the machine.
pub const RESET_CPU: u8 = 1 << 2;
/// Bit 3: the reset includes a power cycle. There is no difference here.
pub const FULL_RESET: u8 = 1 << 3;
/// What the register is saved as.
pub const FORMAT: Format = Format::of::<ResetControlV1>();

const WRITABLE: u8 = SYSTEM_RESET | RESET_CPU | FULL_RESET;

/// One byte at [`PORT`].
pub struct ResetControl {
    power: Arc<dyn Power>,
    control: Mutex<u8>,
}

impl ResetControl {
    /// Tells `power` when the guest resets the machine.
    #[must_use]
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power, control: Mutex::new(0) }
    }

    fn exchange(&self, value: u8) -> u8 {
        std::mem::replace(&mut *self.control.lock().unwrap_or_else(PoisonError::into_inner), value)
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data[0] = *self.control.lock().unwrap_or_else(PoisonError::into_inner);
    }

    fn write(&self, _: u64, data: &[u8]) {
        let before = self.exchange(data[0] & WRITABLE);
        if data[0] & !before & RESET_CPU != 0 {
            self.power.reset();
        }
    }
}

#[derive(Serialize, Deserialize)]
struct ResetControlV1 {
    control: u8,
}

impl Saved for ResetControlV1 {
    const KIND: &'static str = "reset-control";
    const VERSION: u16 = 1;
}

impl Migratable for ResetControl {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let control = *self.control.lock().unwrap_or_else(PoisonError::into_inner);
        out.put(&ResetControlV1 { control })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let ResetControlV1 { control } = from.take()?;
        if control & !WRITABLE != 0 {
            return Err(StateError::invalid::<ResetControlV1>("reserved bits are set"));
        }
        self.exchange(control);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::legacy::testing::{Switch, accesses, get, withstands};

    fn device() -> (Arc<Switch>, ResetControl) {
        let power = Arc::new(Switch::default());
        (Arc::clone(&power), ResetControl::new(power))
    }

    #[test]
    fn resets_on_the_rising_edge_only() {
        let (power, control) = device();
        control.write(0, &[SYSTEM_RESET]);
        assert_eq!(power.resets(), 0);
        control.write(0, &[SYSTEM_RESET | RESET_CPU]);
        assert_eq!(power.resets(), 1);
        control.write(0, &[SYSTEM_RESET | RESET_CPU]);
        assert_eq!(power.resets(), 1);
        control.write(0, &[0]);
        control.write(0, &[RESET_CPU]);
        assert_eq!(power.resets(), 2);
    }

    #[test]
    fn reads_back_what_can_be_written() {
        let (_, control) = device();
        control.write(0, &[0xff]);
        assert_eq!(get(&control, 0), 0x0e);
    }

    #[test]
    fn a_loaded_register_remembers_its_level() {
        let (_, control) = device();
        let (power, twin) = device();
        control.write(0, &[RESET_CPU]);
        migration::state::testing::assert_round_trip(&control, &twin);
        assert_eq!(power.resets(), 0);
        twin.write(0, &[RESET_CPU]);
        assert_eq!(power.resets(), 0);
    }

    proptest! {
        #[test]
        fn any_guest_is_withstood(accesses in accesses(1)) {
            withstands(&device().1, &device().1, &accesses);
        }
    }
}
