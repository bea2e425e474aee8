//! The start information of the PVH boot ABI (Xen: xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::kernel::{Error, Loaded};
use super::memory_map::memory_map;
use crate::arch::layout;
use crate::memory::Ram;

/// `XEN_HVM_START_MAGIC_VALUE`: "xEn3" with the 0x80 bit of the "E" set.
const MAGIC: u32 = 0x336e_c578;

/// Tells a kernel that is entered by PVH what there is.
pub(super) fn write_start_info(ram: &Ram, loaded: &Loaded) -> Result<(), Error> {
    let failed = Error::writing("the PVH start information");
    let write = |address, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(address));
    write(layout::CMDLINE, &[&loaded.cmdline[..], &[0]].concat()).map_err(failed)?;

    let map = memory_map(ram);
    for (at, range) in
        (layout::PVH_MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(&map)
    {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind.e820(),
            ..Default::default()
        };
        ram.write_obj(entry, GuestAddress(at)).map_err(failed)?;
    }
    if let Some((paddr, size)) = loaded.initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        ram.write_obj(module, GuestAddress(layout::PVH_MODULES)).map_err(failed)?;
    }
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: loaded.initrd.is_some().into(),
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: loaded.rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("a handful of ranges"),
        ..Default::default()
    };
    ram.write_obj(start_info, GuestAddress(layout::PVH_START_INFO)).map_err(failed)
}
