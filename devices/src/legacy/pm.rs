//! ACPI's fixed hardware: power button, sleep control and the interrupt that goes with them.
//!
//! Two register blocks that FADT describes: the PM1a events ([`PmEvents`]) and the PM1a control
//! ([`PmControl`]). FADT's `SMI_CMD` should be 0: the machine is in ACPI mode from the start. There
//! is no PM timer (`PM_TMR_LEN` 0), as a guest of KVM has better clocks.
//!
//! Section numbers are those of ACPI 6.5.

use std::sync::{Arc, Mutex, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::Power;
use crate::bus::BusDevice;
use crate::irq::Line;

/// Where `PM1a_EVT_BLK` lies.
pub const EVENTS_PORT: u64 = 0x600;
/// The length of `PM1a_EVT_BLK` in bytes: status, then enable.
pub const EVENTS_SIZE: u64 = 4;
/// Where `PM1a_CNT_BLK` lies.
pub const CONTROL_PORT: u64 = 0x604;
/// The length of `PM1a_CNT_BLK` in bytes.
pub const CONTROL_SIZE: u64 = 2;
/// The global system interrupt that `SCI_INT` should name: level, active high.
pub const SCI: u32 = 9;
/// The `SLP_TYP` that `\_S5` should name.
pub const S5: u16 = 5;

/// The power button was pressed (4.8.3.1.1).
pub const PWRBTN_STS: u16 = 1 << 8;
/// The power button interrupts (4.8.3.1.2).
pub const PWRBTN_EN: u16 = 1 << 8;
/// What the event block is saved as.
pub const EVENTS_FORMAT: Format = Format::of::<PmEventsV1>();
/// What the control block is saved as.
pub const CONTROL_FORMAT: Format = Format::of::<PmControlV1>();

// 4.8.3.1.2: TMR_EN, GBL_EN, PWRBTN_EN, SLPBTN_EN, RTC_EN.
const ENABLE_WRITABLE: u16 = 1 << 0 | 1 << 5 | PWRBTN_EN | 1 << 9 | 1 << 10;

// 4.8.3.2.1
const SCI_EN: u16 = 1 << 0;
const BM_RLD: u16 = 1 << 1;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;
const CONTROL_WRITABLE: u16 = BM_RLD | SLP_TYP;

#[derive(Clone, Copy, Default)]
struct Events {
    status: u16,
    enable: u16,
}

/// The PM1a event block: [`EVENTS_SIZE`] bytes at [`EVENTS_PORT`].
pub struct PmEvents {
    sci: Arc<dyn Line>,
    registers: Mutex<Events>,
}

impl PmEvents {
    /// Nothing has happened; events assert `sci` once the guest enables them.
    #[must_use]
    pub fn new(sci: Arc<dyn Line>) -> Self {
        Self { sci, registers: Mutex::default() }
    }

    /// Presses the power button; what follows is up to the guest.
    pub fn press_power_button(&self) {
        self.change(|events| events.status |= PWRBTN_STS);
    }

    /// Changes the registers and makes the SCI follow (4.8.1).
    fn change(&self, change: impl FnOnce(&mut Events)) {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut registers);
        // With the lock held, so that two levels cannot overtake each other.
        self.sci.set(registers.status & registers.enable != 0);
    }

    fn get(&self) -> Events {
        *self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies `length` bytes of a little-endian register block from `offset` on.
fn read_block(block: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).ok().and_then(|offset| block.get(offset..));
    for (byte, value) in data.iter_mut().zip(from.unwrap_or_default()) {
        *byte = *value;
    }
}

/// Applies `write` to each byte of `data` with its place in the block.
fn each_byte(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (place, byte) in (offset..=u64::MAX).zip(data) {
        write(place, *byte);
    }
}

/// `byte` moved to byte `place` of a 16-bit register.
fn at_byte(place: u64, byte: u8) -> u16 {
    if place == 0 { u16::from(byte) } else { u16::from(byte) << 8 }
}

/// `register` with its byte `place` replaced.
fn with_byte(register: u16, place: u64, byte: u8) -> u16 {
    register & !at_byte(place, 0xff) | at_byte(place, byte)
}

impl BusDevice for PmEvents {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Events { status, enable } = self.get();
        let [s, e] = [status.to_le_bytes(), enable.to_le_bytes()];
        read_block(&[s[0], s[1], e[0], e[1]], offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.change(|events| {
            each_byte(offset, data, |place, byte| match place {
                // Writing a one clears it.
                0 | 1 => events.status &= !at_byte(place, byte),
                2 | 3 => {
                    events.enable = with_byte(events.enable, place - 2, byte) & ENABLE_WRITABLE;
                }
                _ => {}
            });
        });
    }
}

#[derive(Serialize, Deserialize)]
struct PmEventsV1 {
    status: u16,
    enable: u16,
}

impl Saved for PmEventsV1 {
    const KIND: &'static str = "acpi-pm1-events";
    const VERSION: u16 = 1;
}

impl Migratable for PmEvents {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let Events { status, enable } = self.get();
        out.put(&PmEventsV1 { status, enable })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let PmEventsV1 { status, enable } = from.take()?;
        if status & !PWRBTN_STS != 0 || enable & !ENABLE_WRITABLE != 0 {
            return Err(StateError::invalid::<PmEventsV1>("reserved bits are set"));
        }
        self.change(|events| *events = Events { status, enable });
        Ok(())
    }
}

/// The PM1a control block: [`CONTROL_SIZE`] bytes at [`CONTROL_PORT`].
pub struct PmControl {
    power: Arc<dyn Power>,
    control: Mutex<u16>,
}

impl PmControl {
    /// Tells `power` when the guest enters S5.
    #[must_use]
    pub fn new(power: Arc<dyn Power>) -> Self {
        Self { power, control: Mutex::new(0) }
    }

    fn get(&self) -> u16 {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the bytes; the sleep type to enter, if the guest asked for one.
    fn update(&self, offset: u64, data: &[u8]) -> Option<u16> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let mut written = *control;
        each_byte(offset, data, |place, byte| {
            if place < CONTROL_SIZE {
                written = with_byte(written, place, byte);
            }
        });
        *control = written & CONTROL_WRITABLE;
        // SLP_EN always reads as zero.
        (written & SLP_EN != 0).then_some((written & SLP_TYP) >> SLP_TYP_SHIFT)
    }
}

impl BusDevice for PmControl {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_block(&(self.get() | SCI_EN).to_le_bytes(), offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.update(offset, data) == Some(S5) {
            self.power.off();
        }
    }
}

#[derive(Serialize, Deserialize)]
struct PmControlV1 {
    control: u16,
}

impl Saved for PmControlV1 {
    const KIND: &'static str = "acpi-pm1-control";
    const VERSION: u16 = 1;
}

impl Migratable for PmControl {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        out.put(&PmControlV1 { control: self.get() })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let PmControlV1 { control } = from.take()?;
        if control & !CONTROL_WRITABLE != 0 {
            return Err(StateError::invalid::<PmControlV1>("reserved bits are set"));
        }
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = control;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration::state::testing::assert_round_trip;
    use proptest::prelude::*;

    use super::*;
    use crate::legacy::testing::{Switch, Wire, accesses, get, wire, withstands};

    fn events() -> (Arc<Wire>, PmEvents) {
        let sci = wire();
        (Arc::clone(&sci), PmEvents::new(sci))
    }

    fn control() -> (Arc<Switch>, PmControl) {
        let power = Arc::new(Switch::default());
        (Arc::clone(&power), PmControl::new(power))
    }

    #[test]
    fn the_power_button_interrupts_until_its_status_is_cleared() {
        let (sci, events) = events();
        events.write(2, &PWRBTN_EN.to_le_bytes());
        assert!(!sci.level());
        events.press_power_button();
        assert!(sci.level());
        assert_eq!(get(&events, 1), 1);
        events.write(0, &[0xff, 0]);
        assert!(sci.level(), "another bit was cleared");
        events.write(0, &PWRBTN_STS.to_le_bytes());
        assert!(!sci.level());
        assert_eq!(get(&events, 1), 0);
    }

    #[test]
    fn a_button_pressed_before_it_is_enabled_interrupts_then() {
        let (sci, events) = events();
        events.press_power_button();
        assert!(!sci.level());
        events.write(3, &[1]);
        assert!(sci.level());
        events.write(3, &[0]);
        assert!(!sci.level());
    }

    #[test]
    fn the_enable_register_keeps_what_it_defines() {
        let (_, events) = events();
        events.write(0, &[0, 0, 0xff, 0xff]);
        let mut all = [0; 4];
        events.read(0, &mut all);
        assert_eq!(all, [0, 0, 0x21, 0x07]);
    }

    #[test]
    fn sleeping_in_s5_switches_off_and_other_sleeps_do_nothing() {
        let (power, control) = control();
        for sleep in 0..8u16 {
            control.write(0, &(SLP_EN | sleep << SLP_TYP_SHIFT).to_le_bytes());
            assert_eq!(power.offs(), u32::from(sleep >= S5));
        }
        control.write(0, &(S5 << SLP_TYP_SHIFT).to_le_bytes());
        assert_eq!(power.offs(), 1, "the type alone does not sleep");
        control.write(1, &[0x34]);
        assert_eq!(power.offs(), 2, "the upper byte alone does");
    }

    #[test]
    fn the_machine_is_in_acpi_mode_and_sleep_enable_reads_as_zero() {
        let (_, control) = control();
        control.write(0, &0xffffu16.to_le_bytes());
        let mut value = [0; 2];
        control.read(0, &mut value);
        assert_eq!(u16::from_le_bytes(value), SCI_EN | BM_RLD | SLP_TYP);
    }

    #[test]
    fn a_pending_event_interrupts_where_it_arrives() {
        let (_, before) = events();
        before.write(3, &[1]);
        before.press_power_button();
        let (sci, after) = events();
        assert_round_trip(&before, &after);
        assert!(sci.level());
    }

    #[test]
    fn accesses_longer_than_a_block_do_not_panic() {
        events().1.read(3, &mut [0; 8]);
        events().1.write(u64::MAX, &[0]);
        control().1.read(9, &mut [0; 8]);
        control().1.write(1, &[0; 8]);
    }

    proptest! {
        #[test]
        fn any_guest_is_withstood(e in accesses(EVENTS_SIZE), c in accesses(CONTROL_SIZE)) {
            withstands(&events().1, &events().1, &e);
            withstands(&control().1, &control().1, &c);
        }
    }
}
