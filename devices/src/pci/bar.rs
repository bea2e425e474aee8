//! Base address registers: how they are sized and what they decode (PCI 3.0, 6.2.5.1).
//!
//! Sizing needs no code of its own: a guest writes ones and reads back the bits that are writable,
//! and those are all bits of an address but the ones below the size.

use super::registers::{COMMAND, Registers, command};
use super::{Bar, BarKind};

const FIRST: u16 = 0x10;
/// How many a type 0 header has.
pub const COUNT: u8 = 6;

const IO: u64 = 1 << 0;
const MEMORY_64: u64 = 2 << 1;
const PREFETCHABLE: u64 = 1 << 3;

/// A base address register before the guest made anything of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    index: u8,
    kind: BarKind,
    prefetchable: bool,
    size: u64,
}

/// Why there can be no such base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("base address register {index} cannot decode {size:#x} bytes")]
pub struct LayoutError {
    /// Which register.
    pub index: u8,
    /// How many bytes it should decode.
    pub size: u64,
}

impl Layout {
    /// Register `index` for `size` bytes.
    ///
    /// # Errors
    /// When there is no such register, or the size is no power of two that its kind can decode.
    pub fn new(
        index: u8,
        kind: BarKind,
        prefetchable: bool,
        size: u64,
    ) -> Result<Self, LayoutError> {
        let (last, sizes) = match kind {
            BarKind::Io => (COUNT - 1, 4..=256),
            BarKind::Memory32 => (COUNT - 1, 16..=1 << 31),
            BarKind::Memory64 => (COUNT - 2, 16..=1 << 62),
        };
        if index > last || !size.is_power_of_two() || !sizes.contains(&size) {
            return Err(LayoutError { index, size });
        }
        Ok(Self { index, kind, prefetchable: prefetchable && kind != BarKind::Io, size })
    }

    /// How many bytes it decodes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn offset(&self) -> u16 {
        FIRST + 4 * u16::from(self.index)
    }

    /// The bits that tell its kind.
    fn flags(&self) -> u64 {
        let kind = match self.kind {
            BarKind::Io => IO,
            BarKind::Memory32 => 0,
            BarKind::Memory64 => MEMORY_64,
        };
        kind | if self.prefetchable { PREFETCHABLE } else { 0 }
    }

    /// Defines the register in `registers`, placed at `address` after power-on.
    pub fn define(&self, registers: &mut Registers, address: u64) {
        let (value, mask) = (address & !(self.size - 1) | self.flags(), !(self.size - 1));
        if self.kind == BarKind::Memory64 {
            registers.writable(self.offset(), value, mask);
        } else {
            registers.writable(self.offset(), low(value), low(mask));
        }
    }

    /// What the guest made of it.
    #[must_use]
    pub fn read(&self, registers: &Registers) -> Bar {
        let value = match self.kind {
            BarKind::Memory64 => registers.get::<u64>(self.offset()),
            _ => registers.get::<u32>(self.offset()).into(),
        };
        let enable = if self.kind == BarKind::Io { command::IO } else { command::MEMORY };
        Bar {
            index: self.index,
            kind: self.kind,
            prefetchable: self.prefetchable,
            size: self.size,
            address: value & !(self.size - 1),
            decoding: registers.get::<u16>(COMMAND) & enable != 0,
        }
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("32 bits are left")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::registers::CONVENTIONAL;
    use super::*;

    fn defined(layout: Layout) -> Registers {
        let mut registers = Registers::new(CONVENTIONAL);
        registers.writable(COMMAND, 0, command::IO | command::MEMORY);
        layout.define(&mut registers, 0);
        registers
    }

    /// Sizes the register as PCI 3.0, 6.2.5.1 tells software to.
    fn sized(registers: &mut Registers, layout: Layout) -> u64 {
        registers.write(layout.offset(), &[0xff; 4]);
        let wide = layout.kind == BarKind::Memory64;
        if wide {
            registers.write(layout.offset() + 4, &[0xff; 4]);
        }
        let value: u64 = registers.get(layout.offset());
        let flags = if layout.kind == BarKind::Io { 3 } else { 0xf };
        if wide {
            (!(value & !flags)).wrapping_add(1)
        } else {
            u64::from((!(low(value) & !low(flags))).wrapping_add(1))
        }
    }

    #[test]
    fn writing_ones_tells_the_size() {
        for (kind, sizes) in
            [(BarKind::Io, 2..=8), (BarKind::Memory32, 4..=31), (BarKind::Memory64, 4..=62)]
        {
            for size in sizes.map(|shift| 1 << shift) {
                let layout = Layout::new(2, kind, true, size).unwrap();
                assert_eq!(sized(&mut defined(layout), layout), size, "{kind:?}");
            }
        }
    }

    #[test]
    fn the_low_bits_tell_the_kind() {
        for (kind, prefetchable, flags) in [
            (BarKind::Io, true, 1),
            (BarKind::Memory32, false, 0),
            (BarKind::Memory32, true, 8),
            (BarKind::Memory64, false, 4),
            (BarKind::Memory64, true, 0xc_u8),
        ] {
            let layout = Layout::new(0, kind, prefetchable, 256).unwrap();
            assert_eq!(defined(layout).get::<u8>(FIRST), flags, "{kind:?}");
        }
    }

    #[test]
    fn it_decodes_where_it_was_put_while_the_command_register_allows() {
        let layout = Layout::new(3, BarKind::Memory64, true, 0x4000).unwrap();
        let mut registers = defined(layout);
        registers.write(0x1c, &0x4_0000_7fff_u64.to_le_bytes());
        assert_eq!(layout.read(&registers).address, 0x4_0000_4000);
        registers.write(COMMAND, &command::IO.to_le_bytes());
        assert!(!layout.read(&registers).decoding);
        registers.write(COMMAND, &command::MEMORY.to_le_bytes());
        assert!(layout.read(&registers).decoding);
    }

    #[test]
    fn impossible_registers_are_refused() {
        for (index, kind, size) in [
            (6, BarKind::Memory32, 16),
            (5, BarKind::Memory64, 16),
            (0, BarKind::Memory32, 8),
            (0, BarKind::Memory32, 1 << 32),
            (0, BarKind::Memory64, 1 << 63),
            (0, BarKind::Memory64, 0x3000),
            (0, BarKind::Io, 512),
            (0, BarKind::Io, 0),
        ] {
            assert!(Layout::new(index, kind, false, size).is_err(), "{index} {kind:?} {size:#x}");
        }
    }

    proptest! {
        #[test]
        fn an_address_is_always_aligned_and_never_overflows(
            shift in 4u32..63, bytes: [u8; 8], at in 0u16..12,
        ) {
            let layout = Layout::new(0, BarKind::Memory64, false, 1 << shift).unwrap();
            let mut registers = defined(layout);
            registers.write(FIRST - 4 + at, &bytes);
            let bar = layout.read(&registers);
            prop_assert_eq!(bar.address % bar.size, 0);
            prop_assert!(bar.address.checked_add(bar.size - 1).is_some());
        }
    }
}
