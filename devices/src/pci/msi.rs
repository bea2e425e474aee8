//! Message-signalled interrupts (PCI 3.0, 6.8.1).

use std::ops::Range;

use super::registers::{Field, Registers};
use crate::irq::Message;

const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;

const ENABLE: u16 = 1 << 0;
const CAPABLE_SHIFT: u16 = 1;
const MULTIPLE_SHIFT: u16 = 4;
const MULTIPLE: u16 = 7 << MULTIPLE_SHIFT;
const WIDE: u16 = 1 << 7;
const MASKABLE: u16 = 1 << 8;

/// The MSI capability of a function: where it lies and which form it has.
///
/// What the guest wrote is in the function's [`Registers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    offset: u16,
    /// The logarithm of how many vectors it is capable of, 0 to 5.
    capable: u16,
    wide: bool,
    maskable: bool,
}

impl Msi {
    /// One at `offset` with `vectors` of them, a power of two up to 32; `wide` ones take 64-bit
    /// addresses, `maskable` ones can be masked each.
    #[must_use]
    pub fn new(offset: u16, vectors: u8, wide: bool, maskable: bool) -> Self {
        let capable = vectors.clamp(1, 32).ilog2();
        Self { offset, capable: u16::try_from(capable).unwrap_or(0), wide, maskable }
    }

    /// One in the form that a device's own message control register tells.
    #[must_use]
    pub fn of_control(offset: u16, control: u16) -> Self {
        let capable = (control >> CAPABLE_SHIFT & 7).min(5);
        Self { offset, capable, wide: control & WIDE != 0, maskable: control & MASKABLE != 0 }
    }

    /// How many bytes it takes.
    #[must_use]
    pub fn length(&self) -> u16 {
        match (self.wide, self.maskable) {
            (false, false) => 10,
            (true, false) => 14,
            (false, true) => 20,
            (true, true) => 24,
        }
    }

    /// Where it lies in configuration space.
    #[must_use]
    pub fn range(&self) -> Range<u16> {
        self.offset..self.offset + self.length()
    }

    /// How many vectors it is capable of.
    #[must_use]
    pub fn vectors(&self) -> u8 {
        1 << self.capable
    }

    /// Defines its registers, but not its identifier and link.
    pub fn define(&self, registers: &mut Registers) {
        let form = if self.wide { WIDE } else { 0 } | if self.maskable { MASKABLE } else { 0 };
        let value = self.capable << CAPABLE_SHIFT | form;
        registers.writable(self.offset + CONTROL, value, ENABLE | MULTIPLE);
        registers.writable(self.offset + ADDRESS, 0, !3_u32);
        if self.wide {
            registers.writable(self.offset + ADDRESS + 4, 0, !0_u32);
        }
        registers.writable(self.data(), 0, !0_u16);
        if self.maskable {
            let all = u32::MAX >> (32 - u32::from(self.vectors()));
            registers.writable(self.mask(), 0, all);
            registers.define(self.pending(), Field { status: all, ..Field::default() });
        }
    }

    fn data(&self) -> u16 {
        self.offset + if self.wide { 0xc } else { 8 }
    }

    fn mask(&self) -> u16 {
        self.offset + if self.wide { 0x10 } else { 0xc }
    }

    fn pending(&self) -> u16 {
        self.mask() + 4
    }

    /// Whether the guest uses it, so that INTx must be quiet.
    #[must_use]
    pub fn is_enabled(&self, registers: &Registers) -> bool {
        registers.get::<u16>(self.offset + CONTROL) & ENABLE != 0
    }

    /// How many vectors the guest gave it, at most as many as it is capable of.
    #[must_use]
    pub fn enabled_vectors(&self, registers: &Registers) -> u8 {
        let control: u16 = registers.get(self.offset + CONTROL);
        1 << ((control & MULTIPLE) >> MULTIPLE_SHIFT).min(self.capable)
    }

    /// What `vector` becomes: `None` while it is switched off, masked or not given.
    #[must_use]
    pub fn message(&self, registers: &Registers, vector: u8) -> Option<Message> {
        let given = self.enabled_vectors(registers);
        if !self.is_enabled(registers) || vector >= given || self.is_masked(registers, vector) {
            return None;
        }
        let high = if self.wide { registers.get::<u32>(self.offset + ADDRESS + 4) } else { 0 };
        let low: u32 = registers.get(self.offset + ADDRESS);
        let data: u16 = registers.get(self.data());
        // The function changes as many low bits as it needs to tell its vectors apart (6.8.1.6).
        let data = data & !u16::from(given - 1) | u16::from(vector);
        Some(Message { address: u64::from(high) << 32 | u64::from(low), data: data.into() })
    }

    fn is_masked(&self, registers: &Registers, vector: u8) -> bool {
        self.maskable && registers.get::<u32>(self.mask()) >> vector & 1 != 0
    }

    /// Interrupts by `vector`: what to send, or `None` and it is pending if it is masked.
    pub fn fire(&self, registers: &mut Registers, vector: u8) -> Option<Message> {
        let message = self.message(registers, vector);
        let masked = vector < self.vectors() && self.is_masked(registers, vector);
        if message.is_none() && masked && self.is_enabled(registers) {
            let pending: u32 = registers.get(self.pending());
            registers.set(self.pending(), pending | 1 << vector);
        }
        message
    }

    /// What waited for its mask to be taken away; to be called and sent after the guest wrote.
    pub fn take_pending(&self, registers: &mut Registers) -> Vec<Message> {
        if !self.maskable {
            return Vec::new();
        }
        let mut pending: u32 = registers.get(self.pending());
        let mut ready = Vec::new();
        for vector in 0..self.vectors() {
            if pending >> vector & 1 != 0
                && let Some(message) = self.message(registers, vector)
            {
                pending &= !(1 << vector);
                ready.push(message);
            }
        }
        registers.set(self.pending(), pending);
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::super::registers::CONVENTIONAL;
    use super::*;

    const AT: u16 = 0x40;
    const LAPIC: u32 = 0xfee0_1000;

    fn msi(vectors: u8, wide: bool, maskable: bool) -> (Msi, Registers) {
        let msi = Msi::new(AT, vectors, wide, maskable);
        let mut registers = Registers::new(CONVENTIONAL);
        msi.define(&mut registers);
        (msi, registers)
    }

    fn program(msi: Msi, registers: &mut Registers, control: u16, data: u16) {
        registers.write(AT + ADDRESS, &LAPIC.to_le_bytes());
        registers.write(msi.data(), &data.to_le_bytes());
        registers.write(AT + CONTROL, &control.to_le_bytes());
    }

    #[test]
    fn it_sends_what_the_guest_programmed_once_it_is_enabled() {
        for (wide, maskable) in [(false, false), (true, false), (false, true), (true, true)] {
            let (msi, mut registers) = msi(1, wide, maskable);
            program(msi, &mut registers, 0, 0x4041);
            assert_eq!(msi.fire(&mut registers, 0), None, "not enabled");
            program(msi, &mut registers, ENABLE, 0x4041);
            let expected = Message { address: LAPIC.into(), data: 0x4041 };
            assert_eq!(msi.fire(&mut registers, 0), Some(expected));
        }
    }

    #[test]
    fn a_wide_one_has_all_of_the_address() {
        let (msi, mut registers) = msi(1, true, false);
        program(msi, &mut registers, ENABLE, 0);
        registers.write(AT + ADDRESS + 4, &[1, 0, 0, 0]);
        assert_eq!(msi.message(&registers, 0).unwrap().address, 1 << 32 | u64::from(LAPIC));
    }

    #[test]
    fn vectors_change_the_low_bits_and_only_those_given_are_sent() {
        let (msi, mut registers) = msi(8, true, false);
        program(msi, &mut registers, ENABLE | 2 << MULTIPLE_SHIFT, 0x33);
        let data = |vector| msi.message(&registers, vector).map(|message| message.data);
        assert_eq!([0, 1, 3, 4].map(data), [Some(0x30), Some(0x31), Some(0x33), None]);
        program(msi, &mut registers, ENABLE | 7 << MULTIPLE_SHIFT, 0x33);
        assert_eq!(msi.enabled_vectors(&registers), 8, "no more than it is capable of");
    }

    #[test]
    fn a_masked_vector_waits() {
        let (msi, mut registers) = msi(2, true, true);
        program(msi, &mut registers, ENABLE | 1 << MULTIPLE_SHIFT, 8);
        registers.write(msi.mask(), &[2]);
        assert_eq!(msi.fire(&mut registers, 1), None);
        assert_eq!(registers.get::<u32>(msi.pending()), 2);
        assert_eq!(msi.take_pending(&mut registers), []);
        registers.write(msi.mask(), &[0]);
        let sent = msi.take_pending(&mut registers);
        assert_eq!(sent, [Message { address: LAPIC.into(), data: 9 }]);
        assert_eq!(msi.take_pending(&mut registers), []);
    }

    #[test]
    fn a_device_s_own_control_register_tells_the_form() {
        for (control, length, vectors) in [
            (0, 10, 1),
            (WIDE, 14, 1),
            (MASKABLE | 3 << 1, 20, 8),
            (WIDE | MASKABLE | 7 << 1, 24, 32),
        ] {
            let msi = Msi::of_control(AT, control);
            assert_eq!((msi.length(), msi.vectors()), (length, vectors));
        }
    }
}
