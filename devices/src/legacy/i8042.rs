//! The keyboard controller's command port, 0x64, for the one command that kernels still use: reset.
//!
//! There is no keyboard; FADT should say so (`IAPC_BOOT_ARCH` bit 1 clear), and Linux then does
//! not probe. The status reads as "nothing there, ready": a kernel that reboots this way polls for
//! the ready bit before each command, 65536 times if all bits read as ones.

use std::sync::Arc;

use migration::state::{Migratable, StateError, StateReader, StateWriter};

use super::Power;
use crate::bus::BusDevice;

/// The command and status port.
pub const PORT: u64 = 0x64;

/// Pulses the reset line of the CPU (IBM PC AT Technical Reference, keyboard controller commands).
pub const RESET: u8 = 0xfe;

/// One byte at [`PORT`].
pub struct I8042 {
    power: Arc<dyn Power>,
}

impl I8042 {
    /// Tells `power` when the guest resets the machine.
    #[must_use]
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _: u64, data: &mut [u8]) {
        data[0] = 0;
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data[0] == RESET {
            self.power.reset();
        }
    }
}

impl Migratable for I8042 {
    /// It remembers nothing.
    fn save(&self, _: &mut StateWriter) -> Result<(), StateError> {
        Ok(())
    }

    fn load(&self, _: &mut StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::{Switch, get};

    #[test]
    fn only_the_reset_command_resets() {
        let power = Arc::new(Switch::default());
        let port = I8042::new(power.clone());
        for command in 0..=0xff {
            port.write(0, &[command]);
            assert_eq!(power.resets(), u32::from(command >= RESET), "{command:#x}");
        }
    }

    #[test]
    fn a_kernel_that_waits_for_it_does_not_wait() {
        const INPUT_BUFFER_FULL: u8 = 1 << 1;
        const OUTPUT_BUFFER_FULL: u8 = 1 << 0;
        let port = I8042::new(Arc::new(Switch::default()));
        assert_eq!(get(&port, 0) & (INPUT_BUFFER_FULL | OUTPUT_BUFFER_FULL), 0);
    }
}
