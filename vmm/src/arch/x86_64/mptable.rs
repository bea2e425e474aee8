//! The MP table: processors and interrupts for a guest that has its ACPI turned off
//! (Intel MultiProcessor Specification 1.4, 4).

use devices::pci::intx::root_line;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::Ram;

const FLOATING_POINTER: [u8; 4] = *b"_MP_";
const POINTER_BYTES: u64 = 16;
const CONFIGURATION: [u8; 4] = *b"PCMP";
const HEADER_BYTES: usize = 44;
const REVISION: u8 = 4;

// Entry types (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Versions that APICs of this kind have.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
/// Family 6; on-chip FPU and APIC (table 4-5).
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 0x201;

/// What an interrupt is (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Polarity and trigger: as the bus has it; or active low and level-triggered (table 4-10).
const AS_BUS: u8 = 0;
const LOW_LEVEL: u8 = 0b1111;
const EVERY_APIC: u8 = 0xff;

/// Buses by their number here: PCI bus 0, and the one that legacy devices are on.
const PCI: u8 = 0;
const ISA: u8 = 1;
const ISA_INTERRUPTS: u8 = 16;

/// Writes the table for `cpus` processors into `ram`.
pub(crate) fn write(ram: &Ram, cpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    let table = configuration(cpus);
    let at = layout::MP_TABLE + POINTER_BYTES;
    assert!(at + table.len() as u64 <= layout::HIMEM, "interrupts of 32 devices take 2 KiB");
    ram.write_slice(&floating_pointer(at), GuestAddress(layout::MP_TABLE))?;
    ram.write_slice(&table, GuestAddress(at))
}

/// The pointer structure (4.1); there is no IMCR, interrupts go through the APICs.
fn floating_pointer(table: u64) -> Vec<u8> {
    let mut bytes = FLOATING_POINTER.to_vec();
    bytes.extend(low(table).to_le_bytes());
    bytes.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    with_checksum(bytes, 10)
}

fn low(address: u64) -> u32 {
    u32::try_from(address).expect("tables lie below 1 MiB")
}

/// The bytes with byte `at`, a zero, replaced so that all of them add up to zero.
fn with_checksum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] = bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
    bytes
}

/// The configuration table (4.2).
fn configuration(cpus: u8) -> Vec<u8> {
    let ioapic = cpus;
    let mut entries: Vec<Vec<u8>> = (0..cpus).map(processor).collect();
    entries.push([&[BUS, PCI][..], b"PCI   "].concat());
    entries.push([&[BUS, ISA][..], b"ISA   "].concat());
    let address = layout::IOAPIC.to_le_bytes();
    entries.push([&[IO_APIC, ioapic, IOAPIC_VERSION, ENABLED][..], &address].concat());

    let interrupt = |kind, flags, bus, source, pin| {
        vec![IO_INTERRUPT, kind, flags, 0, bus, source, ioapic, pin]
    };
    // The timer comes in at pin 2, whose own interrupt is between the two PICs.
    let isa = (0..ISA_INTERRUPTS).filter(|irq| *irq != 2);
    entries.extend(isa.map(|irq| interrupt(INT, AS_BUS, ISA, irq, if irq == 0 { 2 } else { irq })));
    for (device, pin) in (0..32).flat_map(|device| (0..4).map(move |pin| (device, pin))) {
        // Device in bits 6 to 2, pin in bits 1 and 0 (D.3).
        entries.push(interrupt(INT, LOW_LEVEL, PCI, device << 2 | pin, pci_pin(device, pin)));
    }
    let local = |kind, lint| vec![LOCAL_INTERRUPT, kind, AS_BUS, 0, ISA, 0, EVERY_APIC, lint];
    entries.extend([local(EXT_INT, 0), local(NMI, 1)]);
    with_header(&entries)
}

/// The pin of the I/O APIC that pin `pin` of `device` on the root bus is wired to.
fn pci_pin(device: u8, pin: u8) -> u8 {
    let gsis = layout::PCI_GSIS;
    let lines = u8::try_from(gsis.len()).expect("fewer than there are pins");
    u8::try_from(gsis.start).expect("a pin") + root_line(device, pin, lines)
}

fn processor(index: u8) -> Vec<u8> {
    let flags = ENABLED | if index == 0 { BOOTSTRAP } else { 0 };
    let mut entry = vec![PROCESSOR, index, LAPIC_VERSION, flags];
    entry.extend(SIGNATURE.to_le_bytes());
    entry.extend(FEATURES.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

fn with_header(entries: &[Vec<u8>]) -> Vec<u8> {
    let body = entries.concat();
    let length = u16::try_from(HEADER_BYTES + body.len()).expect("a few KiB");
    let count = u16::try_from(entries.len()).expect("fewer than its bytes");
    let mut table = CONFIGURATION.to_vec();
    table.extend(length.to_le_bytes());
    table.extend([REVISION, 0]);
    table.extend(b"UVMM    ");
    table.extend(b"UVMM        ");
    // No OEM table: its address, its size; then how many entries.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(layout::LAPIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(body);
    with_checksum(table, 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn an_os_finds_the_table_where_it_searches_and_its_checksums_are_right() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        write(&ram, 8).unwrap();
        let mut area = vec![0; 0x1_0000];
        ram.read_slice(&mut area, GuestAddress(0xf_0000)).unwrap();
        let at = area.chunks(16).position(|line| line.starts_with(b"_MP_")).unwrap() * 16;
        let pointer = &area[at..at + 16];
        assert_eq!(sum(pointer), 0);
        let table = u32::from_le_bytes(pointer[4..8].try_into().unwrap()) as usize - 0xf_0000;
        let length = usize::from(u16::from_le_bytes([area[table + 4], area[table + 5]]));
        let table = &area[table..table + length];
        assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));

        let count = u16::from_le_bytes([table[34], table[35]]);
        let (mut rest, mut found) = (&table[HEADER_BYTES..], [0_u16; 5]);
        while let Some(kind) = rest.first() {
            found[usize::from(*kind)] += 1;
            rest = &rest[if *kind == PROCESSOR { 20 } else { 8 }..];
        }
        assert_eq!(found, [8, 2, 1, 15 + 128, 2]);
        assert_eq!(found.iter().sum::<u16>(), count);
    }

    #[test]
    fn the_pins_of_a_device_are_wired_in_turn() {
        assert_eq!([0, 1, 2, 3].map(|pin| pci_pin(1, pin)), [17, 18, 19, 20]);
        assert_eq!(pci_pin(7, 1), 16);
        assert_eq!(pci_pin(31, 3), 18);
    }
}
