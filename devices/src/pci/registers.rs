//! Configuration space as a table: what each byte holds, and what a write does to each of its bits.

use serde::{Deserialize, Serialize};

/// Bytes that a conventional function has (PCI 3.0, 6.1).
pub const CONVENTIONAL: usize = 256;
/// Bytes that the enhanced access mechanism reaches (PCI Express 4.0, 7.2.2).
pub const EXTENDED: usize = 4096;

/// Where the registers of both headers lie (PCI 3.0, figure 6-1).
pub const VENDOR_ID: u16 = 0x00;
/// See [`VENDOR_ID`].
pub const DEVICE_ID: u16 = 0x02;
/// See [`command`].
pub const COMMAND: u16 = 0x04;
/// See [`status`].
pub const STATUS: u16 = 0x06;
/// Revision, then three bytes of class code.
pub const REVISION: u16 = 0x08;
/// The kind of header, and bit 7 where a device has several functions.
pub const HEADER_TYPE: u16 = 0x0e;
/// Where the first capability lies.
pub const CAPABILITIES: u16 = 0x34;
/// Which interrupt firmware routed the pin to; nothing but a scratch register.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Which of INTA to INTD it uses, 1 to 4; 0 for none.
pub const INTERRUPT_PIN: u16 = 0x3d;

/// The command register (PCI 3.0, 6.2.2).
pub mod command {
    /// Answers accesses to I/O ports.
    pub const IO: u16 = 1 << 0;
    /// Answers accesses to memory.
    pub const MEMORY: u16 = 1 << 1;
    /// May master the bus.
    pub const MASTER: u16 = 1 << 2;
    /// Reports parity errors: writable, as drivers expect, and without any effect.
    pub const PARITY: u16 = 1 << 6;
    /// Reports system errors: as [`PARITY`].
    pub const SERR: u16 = 1 << 8;
    /// Keeps INTx from being asserted.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// The status register (PCI 3.0, 6.2.3).
pub mod status {
    /// The function wants to assert INTx.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There is a list of capabilities.
    pub const CAPABILITIES: u16 = 1 << 4;
}

/// One register as it is defined: its content and the fate of each of its bits.
///
/// A bit in none of the masks never changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Field<T> {
    /// After power-on.
    pub value: T,
    /// The bits that become what is written.
    pub writable: T,
    /// The bits that are cleared by writing ones.
    pub clearable: T,
    /// The bits that only the device changes.
    pub status: T,
}

#[derive(Debug, Clone, Copy, Default)]
struct Byte {
    value: u8,
    reset: u8,
    writable: u8,
    clearable: u8,
    status: u8,
}

/// A configuration space. Whatever nobody defined reads as zero and ignores writes.
#[derive(Debug, Clone)]
pub struct Registers(Vec<Byte>);

/// An unsigned number of the widths that registers have.
pub trait Width: Copy + Default {
    /// Its bytes, least significant first.
    fn bytes(self) -> impl Iterator<Item = u8>;
    /// The number that `bytes` make, least significant first.
    fn of(bytes: impl Iterator<Item = u8>) -> Self;
}

macro_rules! width {
    ($($number:ty),*) => {$(
        impl Width for $number {
            fn bytes(self) -> impl Iterator<Item = u8> {
                self.to_le_bytes().into_iter()
            }

            fn of(bytes: impl Iterator<Item = u8>) -> Self {
                let mut all = Self::default().to_le_bytes();
                for (byte, value) in all.iter_mut().zip(bytes) {
                    *byte = value;
                }
                Self::from_le_bytes(all)
            }
        }
    )*};
}
width!(u8, u16, u32, u64);

impl Registers {
    /// A space of `size` bytes, [`CONVENTIONAL`] or [`EXTENDED`].
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self(vec![Byte::default(); size.min(EXTENDED)])
    }

    /// Defines the register at `offset` anew.
    pub fn define<T: Width>(&mut self, offset: u16, field: Field<T>) {
        let Field { value, writable, clearable, status } = field;
        let masks = writable.bytes().zip(clearable.bytes()).zip(status.bytes());
        for ((byte, value), ((writable, clearable), status)) in
            self.tail_mut(offset).zip(value.bytes()).zip(masks)
        {
            *byte = Byte { value, reset: value, writable, clearable, status };
        }
    }

    /// Defines a register that never changes.
    pub fn constant<T: Width>(&mut self, offset: u16, value: T) {
        self.define(offset, Field { value, ..Field::default() });
    }

    /// Defines a register that becomes what is written in the bits of `writable`.
    pub fn writable<T: Width>(&mut self, offset: u16, value: T, writable: T) {
        self.define(offset, Field { value, writable, ..Field::default() });
    }

    /// Changes what the register holds from power-on on, and not what becomes of its bits.
    pub(super) fn preset<T: Width>(&mut self, offset: u16, value: T) {
        for (byte, value) in self.tail_mut(offset).zip(value.bytes()) {
            (byte.value, byte.reset) = (value, value);
        }
    }

    /// What the register holds; zero where the space does not reach.
    #[must_use]
    pub fn get<T: Width>(&self, offset: u16) -> T {
        T::of(self.0.iter().skip(offset.into()).map(|byte| byte.value))
    }

    /// What the guest may change of the register by writing any value.
    #[must_use]
    pub fn writable_bits<T: Width>(&self, offset: u16) -> T {
        T::of(self.0.iter().skip(offset.into()).map(|byte| byte.writable))
    }

    /// Changes the register for the device, whatever a guest may write.
    pub fn set<T: Width>(&mut self, offset: u16, value: T) {
        for (byte, value) in self.tail_mut(offset).zip(value.bytes()) {
            byte.value = value;
        }
    }

    /// Reads for the guest, from any offset and of any length; zeros past the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (byte, own) in data.iter_mut().zip(self.0.iter().skip(offset.into())) {
            *byte = own.value;
        }
    }

    /// Writes for the guest, at any offset and of any length; nothing happens past the end.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (own, new) in self.tail_mut(offset).zip(data) {
            own.value = own.value & !own.writable | new & own.writable;
            own.value &= !(new & own.clearable);
        }
    }

    /// Becomes what it was when it was defined.
    pub fn reset(&mut self) {
        for byte in &mut self.0 {
            byte.value = byte.reset;
        }
    }

    /// What moves with the guest.
    #[must_use]
    pub fn save(&self) -> RegistersV1 {
        RegistersV1 { bytes: self.0.iter().map(|byte| byte.value).collect() }
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// Says why `saved` is not the state of such a space; nothing is changed then.
    pub fn load(&mut self, saved: &RegistersV1) -> Result<(), &'static str> {
        let RegistersV1 { bytes } = saved;
        if bytes.len() != self.0.len() {
            return Err("configuration space has another size");
        }
        let fixed = |own: &Byte| !(own.writable | own.clearable | own.status);
        if self.0.iter().zip(bytes).any(|(own, new)| (own.value ^ new) & fixed(own) != 0) {
            return Err("a bit of configuration space differs that cannot change");
        }
        for (own, new) in self.0.iter_mut().zip(bytes) {
            own.value = *new;
        }
        Ok(())
    }

    fn tail_mut(&mut self, offset: u16) -> impl Iterator<Item = &mut Byte> {
        self.0.iter_mut().skip(offset.into())
    }
}

/// The saved form of [`Registers`], for a device to put into its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersV1 {
    bytes: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Registers {
        let mut registers = Registers::new(CONVENTIONAL);
        registers.constant(VENDOR_ID, 0x1234_u16);
        registers.define(
            COMMAND,
            Field {
                value: 0x0010_0000,
                writable: 0x0407,
                clearable: 0xf900_0000,
                status: 0x8_0000_u32,
            },
        );
        registers.writable(0x10, 0xc, 0xffff_f000_u32);
        registers
    }

    #[test]
    fn each_bit_has_the_fate_that_was_defined() {
        let mut registers = sample();
        registers.write(0, &[0xff; 8]);
        assert_eq!(registers.get::<u32>(COMMAND), 0x0010_0407);
        registers.set(STATUS, 0xf918_u16);
        registers.write(STATUS, &[0xff, 0x10]);
        assert_eq!(registers.get::<u16>(STATUS), 0xe918, "only what was written as one clears");
        assert_eq!(registers.get::<u16>(VENDOR_ID), 0x1234);
        registers.reset();
        assert_eq!(registers.get::<u32>(COMMAND), 0x0010_0000);
    }

    #[test]
    fn narrow_and_unaligned_accesses_reach_their_bytes_alone() {
        let mut registers = sample();
        registers.write(0x11, &[0xab, 0xcd]);
        assert_eq!(registers.get::<u32>(0x10), 0x00cd_a00c);
        let mut data = [0xff; 3];
        registers.read(0x0f, &mut data);
        assert_eq!(data, [0, 0x0c, 0xa0]);
    }

    #[test]
    fn past_the_end_there_is_nothing() {
        let mut registers = sample();
        registers.write(0xfe, &[0xff; 8]);
        registers.write(u16::MAX, &[0xff]);
        let mut data = [0xff; 8];
        registers.read(0xfe, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!(registers.get::<u32>(0xffe), 0);
    }

    #[test]
    fn a_state_of_another_device_is_refused() {
        let mut registers = sample();
        let good = registers.save();
        registers.write(0x10, &[0xff; 4]);
        let RegistersV1 { mut bytes } = good.clone();
        bytes[0] ^= 1;
        assert!(registers.load(&RegistersV1 { bytes }).is_err());
        assert!(registers.load(&RegistersV1 { bytes: vec![0; 255] }).is_err());
        assert_eq!(registers.get::<u32>(0x10), 0xffff_f00c, "a refused load changes nothing");
        registers.load(&good).unwrap();
        assert_eq!(registers.get::<u32>(0x10), 0xc);
    }

    proptest! {
        #[test]
        fn no_write_reaches_a_bit_that_is_not_the_guests(
            writes in prop::collection::vec((0u16..0x110, prop::collection::vec(any::<u8>(), 0..9)), 0..32),
        ) {
            let mut registers = sample();
            for (offset, data) in &writes {
                registers.write(*offset, data);
            }
            prop_assert_eq!(registers.get::<u16>(VENDOR_ID), 0x1234);
            prop_assert_eq!(registers.get::<u32>(COMMAND) & !0x0407, 0x0010_0000);
            prop_assert_eq!(registers.get::<u32>(0x10) & 0xfff, 0xc);
            let saved = registers.save();
            let mut twin = sample();
            twin.load(&saved).unwrap();
            prop_assert_eq!(twin.save(), saved);
        }
    }
}
