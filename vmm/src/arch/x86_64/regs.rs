//! The registers that a vCPU starts with, for each way to enter a kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::boot::Entry;
use crate::kvm::Error;
use crate::memory::Ram;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page table entry: present and writable.
const TABLE: u64 = 0b11;
/// Page directory entry: present, writable, a 2 MiB page.
const LARGE_PAGE: u64 = 0b1000_0011;

/// Segment descriptors at their selectors' places: `__BOOT_CS` is 0x10 and `__BOOT_DS` 0x18
/// (Linux x86 boot protocol, 64-bit), PVH leaves the selectors open (Xen PVH boot ABI).
const NULL: u64 = 0;
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x0000_8b00_0000_0067;

/// Puts the boot vCPU at `entry`, and writes the tables in RAM that its registers point at.
pub(crate) fn enter(fd: &VcpuFd, ram: &Ram, entry: &Entry) -> Result<(), BootError> {
    let mut sregs = fd.get_sregs().map_err(Error::ioctl("KVM_GET_SREGS"))?;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    let code = match *entry {
        Entry::Pvh(rip) => {
            (regs.rip, regs.rbx) = (rip, layout::PVH_START_INFO);
            sregs.cr0 = CR0_PE | CR0_ET;
            CODE_32
        }
        Entry::Linux64(rip) => {
            (regs.rip, regs.rsi) = (rip, layout::ZERO_PAGE);
            (regs.rsp, regs.rbp) = (layout::BOOT_STACK, layout::BOOT_STACK);
            identity_map(ram)?;
            sregs.cr3 = layout::BOOT_PML4;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PE | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            CODE_64
        }
    };
    segments(&mut sregs, ram, code)?;
    fd.set_sregs(&sregs).map_err(Error::ioctl("KVM_SET_SREGS"))?;
    fd.set_regs(&regs).map_err(Error::ioctl("KVM_SET_REGS"))?;
    Ok(())
}

/// Why a vCPU could not be put at a kernel's entry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// KVM refused a register.
    #[error(transparent)]
    Kvm(#[from] Error),
    /// The tables do not fit into RAM.
    #[error("cannot write the boot tables into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Flat segments, both in the registers and in the table that they come from.
fn segments(sregs: &mut kvm_sregs, ram: &Ram, code: u64) -> Result<(), BootError> {
    let table = [NULL, NULL, code, DATA, TSS];
    for (at, descriptor) in (layout::BOOT_GDT..).step_by(8).zip(table) {
        ram.write_obj(descriptor, GuestAddress(at))?;
    }
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(code, 0x10);
    let data = segment(DATA, 0x18);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS, 0x20);
    Ok(())
}

/// The first 4 GiB at their own addresses, in 2 MiB pages.
fn identity_map(ram: &Ram) -> Result<(), BootError> {
    ram.write_obj(layout::BOOT_PDPT | TABLE, GuestAddress(layout::BOOT_PML4))?;
    for gib in 0..4 {
        let directory = layout::BOOT_PD + gib * 0x1000;
        ram.write_obj(directory | TABLE, GuestAddress(layout::BOOT_PDPT + gib * 8))?;
        for page in 0..512 {
            let entry = gib << 30 | page << 21 | LARGE_PAGE;
            ram.write_obj(entry, GuestAddress(directory + page * 8))?;
        }
    }
    Ok(())
}

/// A descriptor (SDM vol. 3, 3.4.5) as KVM wants it. Every base here is zero.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bits = |from: u32, count: u32| -> u8 {
        u8::try_from(descriptor >> from & ((1 << count) - 1)).expect("at most four bits")
    };
    let limit = descriptor & 0xffff | descriptor >> 32 & 0xf_0000;
    let granularity = bits(55, 1);
    let limit = if granularity == 1 { limit << 12 | 0xfff } else { limit };
    kvm_segment {
        base: 0,
        limit: u32::try_from(limit).expect("20 bits, shifted by 12"),
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: granularity,
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_becomes_the_segment_that_it_describes() {
        let code = segment(CODE_64, 0x10);
        assert_eq!((code.l, code.db, code.g, code.s, code.type_), (1, 0, 1, 1, 0xb));
        assert_eq!(code.limit, u32::MAX);
        let tss = segment(TSS, 0x20);
        assert_eq!((tss.s, tss.type_, tss.limit, tss.present), (0, 0xb, 0x67, 1));
    }
}
