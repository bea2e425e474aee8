//! What a guest's driver takes a function for: another function can be put in its place only if it
//! looks the same.

use super::capability::{id, walk};
use super::registers::{CONVENTIONAL, DEVICE_ID, REVISION, VENDOR_ID};
use super::{BarKind, PciFunction};

const SUBSYSTEM: u16 = 0x2c;
const MESSAGE_CONTROL: u16 = 2;
const TABLE: u16 = 4;
const PENDING: u16 = 8;
const TABLE_SIZE: u16 = 0x7ff;

/// What a guest's driver takes a function for, in words that can be compared and read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Vendor and device, class and revision, subsystem: `8086:10ca class 020000 rev 01 …`.
    pub model: String,
    /// The base address registers: `0: 16 KiB 64-bit, 3: 16 KiB 64-bit`.
    pub bars: String,
    /// The table of interrupts: `3 vectors, table in 3 at 0x0, pending in 3 at 0x2000`.
    pub interrupts: String,
    /// The capabilities and where they are: `01@40 05@50`.
    pub capabilities: String,
}

impl Identity {
    /// What the guest sees of `function`.
    #[must_use]
    pub fn of(function: &dyn PciFunction) -> Self {
        let mut space = [0; CONVENTIONAL];
        function.read_config(0, &mut space);
        let byte = |at: u16| space.get(usize::from(at)).copied().unwrap_or(0);
        let word = |at: u16| u16::from_le_bytes([byte(at), byte(at + 1)]);
        let double = |at: u16| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let class = double(REVISION);
        let capabilities = walk(byte);
        let table = capabilities.iter().find(|(id, _)| *id == id::MSIX).map(|(_, at)| *at);
        Self {
            model: format!(
                "{:04x}:{:04x} class {:06x} rev {:02x} subsystem {:04x}:{:04x}",
                word(VENDOR_ID),
                word(DEVICE_ID),
                class >> 8,
                class & 0xff,
                word(SUBSYSTEM),
                word(SUBSYSTEM + 2),
            ),
            bars: bars(function),
            interrupts: table.map_or("no table".to_owned(), |at| {
                let (table, pending) = (double(at + TABLE), double(at + PENDING));
                format!(
                    "{} vectors, table in {} at {:#x}, pending in {} at {:#x}",
                    (word(at + MESSAGE_CONTROL) & TABLE_SIZE) + 1,
                    table & 7,
                    table & !7,
                    pending & 7,
                    pending & !7,
                )
            }),
            capabilities: list(capabilities.iter().map(|(id, at)| format!("{id:02x}@{at:02x}"))),
        }
    }
}

fn bars(function: &dyn PciFunction) -> String {
    list(function.bars().into_iter().map(|bar| {
        let kind = match bar.kind {
            BarKind::Io => "ports",
            BarKind::Memory32 => "32-bit",
            BarKind::Memory64 => "64-bit",
        };
        let prefetchable = if bar.prefetchable { " prefetchable" } else { "" };
        format!("{}: {:#x} bytes {kind}{prefetchable}", bar.index, bar.size)
    }))
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items = items.collect::<Vec<_>>().join(", ");
    if items.is_empty() { "none".to_owned() } else { items }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Card;
    use super::*;

    #[test]
    fn a_function_is_described_by_what_its_driver_depends_on() {
        let identity = Identity::of(&*Card::new());
        assert_eq!(identity.model, "5678:1234 class 000000 rev 00 subsystem 0000:0000");
        assert_eq!(
            identity.bars,
            "0: 0x4000 bytes 64-bit prefetchable, 2: 0x1000 bytes 32-bit, 3: 0x10 bytes ports"
        );
        assert_eq!((&*identity.interrupts, &*identity.capabilities), ("no table", "none"));
    }

    #[test]
    fn where_the_guest_put_it_does_not_matter() {
        let (one, other) = (Card::new(), Card::new());
        let _ = other.write_config(0x10, &0xf000_0000_u32.to_le_bytes());
        let _ = other.write_config(4, &[7, 0]);
        assert_eq!(Identity::of(&*one), Identity::of(&*other));
    }
}
