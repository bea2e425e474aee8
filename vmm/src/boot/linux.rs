//! The zero page of the Linux x86 boot protocol (kernel: Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::kernel::{Error, Loaded};
use super::memory_map::memory_map;
use crate::arch::layout;
use crate::memory::Ram;

/// `boot_flag` and `header` of a zero page that comes from no bzImage.
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// "Undefined" boot loader.
const LOADER: u8 = 0xff;

/// Tells a kernel that is entered at its 64-bit entry what there is.
pub(super) fn write_zero_page(
    ram: &Ram,
    loaded: &Loaded,
    header: setup_header,
) -> Result<(), Error> {
    let failed = Error::writing("the boot parameters");
    let cmdline = [&loaded.cmdline[..], &[0]].concat();
    ram.write_slice(&cmdline, GuestAddress(layout::CMDLINE)).map_err(failed)?;

    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HDRS;
    params.hdr.type_of_loader = LOADER;
    let low = |address: u64| u32::try_from(address).expect("it lies below 4 GiB");
    params.hdr.cmd_line_ptr = low(layout::CMDLINE);
    params.hdr.cmdline_size = u32::try_from(loaded.cmdline.len()).expect("it is below 2048");
    if let Some((start, size)) = loaded.initrd {
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (low(start), low(size));
    }
    params.acpi_rsdp_addr = loaded.rsdp;
    let map = memory_map(ram);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind.e820() };
    }
    params.e820_entries = u8::try_from(map.len()).expect("a handful of ranges");
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE)).map_err(failed)
}
