//! Where things are in the guest's physical address space and port space.

use std::ops::Range;

/// Initial PVH start information, `hvm_start_info` (Xen's PVH boot ABI).
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// The memory map that the PVH start information points at.
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6100;
/// The module list (the initrd) that the PVH start information points at.
pub(crate) const PVH_MODULES: u64 = 0x6f00;
/// Linux `boot_params`, the "zero page".
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer of the 64-bit entry; it grows down from here.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// The page tables of the 64-bit entry: one PML4, one page of PDPTEs, four pages of 2 MiB PDEs.
pub(crate) const BOOT_PML4: u64 = 0x9000;
/// See [`BOOT_PML4`].
pub(crate) const BOOT_PDPT: u64 = 0xa000;
/// See [`BOOT_PML4`].
pub(crate) const BOOT_PD: u64 = 0xb000;
/// The descriptor table that is in force at either entry.
pub(crate) const BOOT_GDT: u64 = 0x500;

/// The kernel's command line, NUL-terminated.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its NUL; Linux on x86 takes at most 2048 (`COMMAND_LINE_SIZE`).
pub(crate) const CMDLINE_SIZE: usize = 2048;

/// End of conventional memory; from here to [`HIMEM`] the guest finds no usable RAM.
pub(crate) const LOWMEM_END: u64 = 0x9_fc00;
/// ACPI tables, in the area where an OS also searches for the RSDP (ACPI 6.5, 5.2.5.1).
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub(crate) const ACPI_TABLES_END: u64 = 0xf_0000;
/// The MP floating pointer, then its table, in the area where an OS searches for the pointer
/// (MultiProcessor Specification 1.4, 4.1).
pub(crate) const MP_TABLE: u64 = ACPI_TABLES_END;
/// Start of extended memory, where a kernel is loaded.
pub(crate) const HIMEM: u64 = 0x10_0000;

/// The hole below 4 GiB for memory-mapped devices: RAM continues above it.
pub(crate) const MMIO_HOLE: u64 = 0xc000_0000;
/// End of the hole.
pub(crate) const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// The I/O APIC (the address that KVM's in-kernel model answers at).
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LAPIC: u32 = 0xfee0_0000;
/// One page for the identity map that some Intel processors need, below the TSS.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for the task state segment that some Intel processors need.
pub(crate) const TSS: usize = 0xfffb_d000;

/// The memory below 4 GiB that PCI functions may decode.
pub(crate) const PCI_MEMORY: Range<u64> = MMIO_HOLE..0xe000_0000;
/// The part of it that the bridge with the slots has for what is behind it.
pub(crate) const SLOT_MEMORY: Range<u64> = MMIO_HOLE..0xd000_0000;
/// The working registers of that bridge's hot-plug controller.
pub(crate) const SLOT_REGISTERS: u64 = SLOT_MEMORY.end;
/// The enhanced access to PCI configuration space.
pub(crate) const ECAM: Range<u64> = PCI_MEMORY.end..PCI_MEMORY.end + ((PCI_BUSES as u64) << 20);
/// How many PCI buses there can be, from 0 on.
pub(crate) const PCI_BUSES: u8 = 16;
/// The ports that PCI functions may decode: none that a PC has at a fixed place.
pub(crate) const PCI_IO: Range<u64> = 0x1000..0x1_0000;
/// The part of them that the bridge with the slots has for what is behind it.
pub(crate) const SLOT_IO: Range<u64> = 0xc000..0xd000;
/// The bus behind that bridge.
pub(crate) const SLOT_BUS: u8 = 1;
/// The global system interrupts that PCI's interrupt pins are wired to, in turn: those that no
/// legacy device and no PIC has.
pub(crate) const PCI_GSIS: Range<u32> = 16..24;

/// The memory above all RAM that PCI functions may decode, on processors that have `address_bits`
/// of physical address: none where there is no room.
///
/// It begins at a multiple of its size, so that it is the same for most sizes of RAM.
pub(crate) fn pci_memory_64(ram: u64, address_bits: u8) -> Option<Range<u64>> {
    const SIZE: u64 = 16 << 30;
    let (last, bytes) = *ram_ranges(ram).last()?;
    let start = (last + bytes).max(MMIO_HOLE_END).checked_next_multiple_of(SIZE)?;
    let end = start.checked_add(SIZE)?;
    let reach = 1_u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX);
    (end <= reach).then_some(start..end)
}

/// The part of [`pci_memory_64`] that the bridge with the slots has for what is behind it.
pub(crate) fn slot_memory_64(window: Option<Range<u64>>) -> Range<u64> {
    window.map_or(0..0, |window| window.start..window.start + (window.end - window.start) / 2)
}

/// The ranges of guest RAM, `(start, bytes)`, for `size` bytes of it.
///
/// What does not fit below the hole continues at 4 GiB.
pub(crate) fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= MMIO_HOLE {
        vec![(0, size)]
    } else {
        vec![(0, MMIO_HOLE), (MMIO_HOLE_END, size - MMIO_HOLE)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_memory_lies_above_all_ram_and_within_reach() {
        let gib = |range: Range<u64>| range.start >> 30..range.end >> 30;
        assert_eq!(pci_memory_64(512 << 20, 36).map(gib), Some(16..32));
        assert_eq!(pci_memory_64(15 << 30, 36).map(gib), Some(16..32));
        assert_eq!(pci_memory_64(16 << 30, 36).map(gib), Some(32..48));
        assert_eq!(pci_memory_64(48 << 30, 36), None);
        assert_eq!(pci_memory_64(48 << 30, 64).map(gib), Some(64..80));
        assert_eq!(pci_memory_64(1 << 60, 52), None);
    }

    #[test]
    fn nothing_of_pci_lies_over_another_part_of_the_hole() {
        let ends = [SLOT_MEMORY.end, SLOT_REGISTERS + 0x1000, PCI_MEMORY.end, ECAM.end];
        assert!(ends.is_sorted() && ECAM.end <= u64::from(IOAPIC));
    }

    #[test]
    fn ram_continues_above_the_hole() {
        assert_eq!(ram_ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }
}
