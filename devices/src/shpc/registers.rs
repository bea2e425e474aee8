//! The working register set of a hot-plug controller (SHPC 1.0, 4).
//!
//! Plain state: what the guest does to it returns, and how its interrupt stands can be asked.

use serde::{Deserialize, Serialize};

use super::slot::{Fault, Slot, State, View};

/// The most slots that a controller can have.
pub const SLOTS_MAX: u8 = 31;
/// The device number of the first slot on the bus behind the bridge; the others follow.
pub const FIRST_DEVICE: u8 = 1;
/// The number that is written on the first slot, and that a guest calls it; the others count up.
pub const FIRST_NUMBER: u8 = 1;

// The registers, by the number of their double word (table 4-2).
const BASE_OFFSET: u64 = 0;
const SLOTS_AVAILABLE_I: u64 = 1;
const SLOTS_AVAILABLE_II: u64 = 2;
const SLOT_CONFIGURATION: u64 = 3;
const BUS_CONFIGURATION: u64 = 4;
const COMMAND: u64 = 5;
const INTERRUPT_LOCATOR: u64 = 6;
const SERR_LOCATOR: u64 = 7;
const SERR_INT: u64 = 8;
const FIRST_SLOT: u64 = 9;

/// Slot configuration (4.4): numbers count up, there are sensors at the latches, and buttons.
const COUNTS_UP: u32 = 1 << 29;
const MRL_SENSORS: u32 = 1 << 30;
const BUTTONS: u32 = 1 << 31;
/// Bus configuration (4.5): 33 MHz, conventional; the programming interface of SHPC 1.0.
const INTERFACE: u32 = 1 << 24;

// Controller SERR-INT enable (4.8).
const GLOBAL_MASK: u32 = 1 << 0;
const COMMAND_MASK: u32 = 1 << 2;
const SERR_INT_WRITABLE: u32 = 0xf;
const COMMAND_DONE: u32 = 1 << 16;
const SERR_INT_CLEARABLE: u32 = 1 << 16 | 1 << 17;

// Controller commands (table 4-10).
const SLOT_OPERATIONS: std::ops::RangeInclusive<u8> = 0x00..=0x3f;
const SPEED_33: u8 = 0x40;
const SPEEDS: std::ops::RangeInclusive<u8> = 0x41..=0x47;
const POWER_ONLY_ALL: u8 = 0x48;
const ENABLE_ALL: u8 = 0x49;

/// A controller with its slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    slots: Vec<Slot>,
    command: u16,
    /// The error bits of the command status register.
    errors: u16,
    serr_int: u32,
}

pub(super) fn low_byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

impl Controller {
    /// One of `slots` empty slots, 1 to [`SLOTS_MAX`], as after power-on.
    #[must_use]
    pub fn new(slots: u8) -> Self {
        let slots = vec![Slot::new(false); slots.clamp(1, SLOTS_MAX).into()];
        Self { slots, command: 0, errors: 0, serr_int: SERR_INT_WRITABLE }
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u8 {
        u8::try_from(self.slots.len()).expect("at most SLOTS_MAX")
    }

    /// Bytes of the register set.
    #[must_use]
    pub fn size(&self) -> u64 {
        4 * (FIRST_SLOT + u64::from(self.slots()))
    }

    /// Becomes what it was after power-on; cards stay where they are.
    pub fn reset(&mut self) {
        let mut new = Self::new(self.slots());
        for (new, old) in new.slots.iter_mut().zip(&self.slots) {
            *new = Slot::new(old.view().card);
        }
        *self = new;
    }

    /// What a slot looks like, by its index from 0.
    #[must_use]
    pub fn view(&self, slot: u8) -> Option<View> {
        self.slots.get(usize::from(slot)).map(Slot::view)
    }

    /// The devices behind the bridge that are on the bus, one bit for each device number.
    #[must_use]
    pub fn connected(&self) -> u32 {
        let enabled = self.slots.iter().zip(FIRST_DEVICE..);
        let enabled = enabled.filter(|(slot, _)| slot.view().state == State::Enabled);
        enabled.fold(0, |all, (_, device)| all | 1 << device)
    }

    /// The double word with `number`; zero where there is none.
    #[must_use]
    pub fn dword(&self, number: u64) -> u32 {
        let slots = u32::from(self.slots());
        match number {
            SLOTS_AVAILABLE_I => slots,
            BASE_OFFSET | SLOTS_AVAILABLE_II | SERR_LOCATOR => 0,
            SLOT_CONFIGURATION => {
                let (device, number) = (u32::from(FIRST_DEVICE), u32::from(FIRST_NUMBER));
                slots | device << 8 | number << 16 | COUNTS_UP | MRL_SENSORS | BUTTONS
            }
            BUS_CONFIGURATION => INTERFACE,
            COMMAND => u32::from(self.command) | u32::from(self.errors) << 16,
            INTERRUPT_LOCATOR => self.locator(),
            SERR_INT => self.serr_int,
            _ => self.slot_at(number).map_or(0, Slot::register),
        }
    }

    fn slot_at(&self, number: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(number.checked_sub(FIRST_SLOT)?).ok()?)
    }

    /// Reads from `offset` on, of any length.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            *byte = self.dword(at / 4).to_le_bytes()[usize::try_from(at % 4).expect("below 4")];
        }
    }

    /// Writes from `offset` on, of any length.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = (offset..=u64::MAX).zip(data).peekable();
        while let Some(&(first, _)) = bytes.peek() {
            let (mut value, mut mask) = (0, 0);
            while let Some((at, byte)) = bytes.next_if(|(at, _)| at / 4 == first / 4) {
                let shift = 8 * (at % 4);
                value |= u32::from(*byte) << shift;
                mask |= 0xff_u32 << shift;
            }
            self.write_dword(first / 4, value, mask);
        }
    }

    /// Writes the bits of `mask`, whole bytes, of the double word with `number`.
    pub fn write_dword(&mut self, number: u64, value: u32, mask: u32) {
        match number {
            COMMAND => {
                let [v0, v1, ..] = value.to_le_bytes();
                let [m0, m1, ..] = mask.to_le_bytes();
                let (value, mask) = (u16::from_le_bytes([v0, v1]), u16::from_le_bytes([m0, m1]));
                self.command = (self.command & !mask | value & mask) & 0x1fff;
                // The code starts a command; a lone write of the target does not.
                if m0 != 0 {
                    self.execute();
                }
            }
            SERR_INT => {
                let (writable, value) = (SERR_INT_WRITABLE & mask, value & mask);
                self.serr_int = self.serr_int & !writable | value & writable;
                self.serr_int &= !(value & SERR_INT_CLEARABLE);
            }
            _ => {
                let slot = number.checked_sub(FIRST_SLOT).and_then(|n| usize::try_from(n).ok());
                if let Some(slot) = slot.and_then(|index| self.slots.get_mut(index)) {
                    slot.write(value, mask);
                }
            }
        }
    }

    /// Does what the command register says, at once: it is never busy.
    fn execute(&mut self) {
        let [code, target] = self.command.to_le_bytes();
        let result = match code {
            code if SLOT_OPERATIONS.contains(&code) => self.operate(target, code),
            SPEED_33 => Ok(()),
            code if SPEEDS.contains(&code) => Err(Fault::Speed),
            POWER_ONLY_ALL => self.switch_all(State::PoweredOnly),
            ENABLE_ALL => self.switch_all(State::Enabled),
            _ => Err(Fault::Invalid),
        };
        self.errors = result.err().map_or(0, |fault| fault as u16);
        self.serr_int |= COMMAND_DONE;
    }

    /// Targets are slots, counted from 1.
    fn operate(&mut self, target: u8, operation: u8) -> Result<(), Fault> {
        let index = target.checked_sub(1).ok_or(Fault::Invalid)?;
        self.slots.get_mut(usize::from(index)).ok_or(Fault::Invalid)?.operate(operation)
    }

    /// Powers every slot that has a card, and lights it; none if one is on the bus already.
    fn switch_all(&mut self, state: State) -> Result<(), Fault> {
        if self.slots.iter().any(|slot| slot.view().state == State::Enabled) {
            return Err(Fault::Invalid);
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.view().card) {
            const POWER_LED_ON: u8 = 1 << 2;
            slot.operate(state as u8 | POWER_LED_ON)?;
        }
        Ok(())
    }

    /// The interrupt locator (4.6): who interrupts, the controller and then the slots.
    fn locator(&self) -> u32 {
        let command = self.serr_int & COMMAND_DONE != 0 && self.serr_int & COMMAND_MASK == 0;
        let slots = self.slots.iter().zip(1..).filter(|(slot, _)| slot.interrupts());
        slots.fold(u32::from(command), |all, (_, number)| all | 1 << number)
    }

    /// Whether it asserts its interrupt.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.locator() != 0 && self.serr_int & GLOBAL_MASK == 0
    }

    /// Whether the guest has a driver that would hear the button of `slot`.
    #[must_use]
    pub fn hears_button(&self, slot: u8) -> bool {
        let slot = self.slots.get(usize::from(slot));
        self.serr_int & GLOBAL_MASK == 0 && slot.is_some_and(Slot::hears_button)
    }

    /// Presses the attention button of `slot`.
    pub fn press_button(&mut self, slot: u8) {
        self.change(slot, Slot::press_button);
    }

    /// Whether the guest has not taken notice of the last press of `slot`'s button yet.
    #[must_use]
    pub fn is_pressed(&self, slot: u8) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(Slot::is_pressed)
    }

    /// Withdraws a press of `slot`'s button that the guest has not taken notice of.
    pub fn withdraw_press(&mut self, slot: u8) {
        self.change(slot, Slot::withdraw_press);
    }

    /// Puts a card into `slot`; the guest powers it when it is told by the button.
    pub fn insert(&mut self, slot: u8) {
        self.change(slot, Slot::insert);
    }

    /// Puts a card into `slot` as if it had always been there.
    pub fn insert_cold(&mut self, slot: u8) {
        self.change(slot, Slot::insert_cold);
    }

    /// Pulls the card out of `slot`.
    pub fn pull(&mut self, slot: u8) {
        self.change(slot, Slot::pull);
    }

    fn change(&mut self, slot: u8, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.slots.get_mut(usize::from(slot)) {
            change(slot);
        }
    }

    /// What moves with the guest.
    #[must_use]
    pub fn save(&self) -> ControllerV1 {
        let Self { slots, command, errors, serr_int } = self;
        let slots = slots.iter().map(Slot::register).collect();
        ControllerV1 { slots, command: *command, errors: *errors, serr_int: *serr_int }
    }

    /// Becomes what was saved, with the same cards in the same slots.
    ///
    /// # Errors
    /// Says why it cannot; nothing is changed then.
    pub fn load(&mut self, saved: &ControllerV1) -> Result<(), &'static str> {
        let ControllerV1 { slots, command, errors, serr_int } = saved;
        if slots.len() != self.slots.len() {
            return Err("the controller has another number of slots");
        }
        let slots: Option<Vec<_>> = slots.iter().map(|slot| Slot::of_register(*slot)).collect();
        let slots = slots.ok_or("a slot is in a state that no slot can be in")?;
        if slots.iter().zip(&self.slots).any(|(new, own)| new.view().card != own.view().card) {
            return Err("other slots hold a device there than here");
        }
        let faults = [0, Fault::MrlOpen as u16, Fault::Invalid as u16, Fault::Speed as u16];
        let reserved = serr_int & !(SERR_INT_WRITABLE | COMMAND_DONE) != 0;
        if reserved || command & !0x1fff != 0 || !faults.contains(errors) {
            return Err("reserved bits of the hot-plug controller are set");
        }
        *self = Self { slots, command: *command, errors: *errors, serr_int: *serr_int };
        Ok(())
    }
}

/// The saved form of [`Controller`], for its bridge to put into its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerV1 {
    /// The logical slot registers.
    slots: Vec<u32>,
    command: u16,
    errors: u16,
    serr_int: u32,
}

#[cfg(test)]
#[path = "registers/tests.rs"]
mod tests;
