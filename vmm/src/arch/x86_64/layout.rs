//! Where things are in the guest's physical address space and port space.

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
pub(crate) const ACPI_TABLES_END: u64 = 0x10_0000;
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
    fn ram_continues_above_the_hole() {
        assert_eq!(ram_ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }
}
