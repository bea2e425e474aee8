//! Kernel and initrd: recognised, checked and loaded into guest RAM.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use super::{linux, pvh};
use crate::arch::layout;
use crate::config::Boot;
use crate::memory::Ram;

const PAGE: u64 = 4096;
/// `EM_X86_64` in an ELF header.
const ELF_X86_64: u16 = 62;
/// `XLF_KERNEL_64`: the image has a 64-bit entry 0x200 after its start (Linux x86 boot protocol).
const XLF_KERNEL_64: u16 = 1;
/// The oldest boot protocol that tells all that is needed here: 2.12, Linux 3.8.
const OLDEST_PROTOCOL: u16 = 0x20c;
/// An ELF kernel finds its initrd anywhere below this, as an old bzImage does.
const INITRD_LIMIT: u64 = 0x8000_0000;

/// Lets a kernel be seen on the console; the tiny guest passes over it.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// Where and how a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 32-bit protected mode, by the PVH boot ABI.
    Pvh(u64),
    /// In 64-bit mode, by the Linux x86 boot protocol.
    Linux64(u64),
}

/// What is in guest RAM besides the kernel, as a kernel is told.
pub(super) struct Loaded {
    /// The initrd: where it starts and its bytes.
    pub(super) initrd: Option<(u64, u64)>,
    pub(super) cmdline: Vec<u8>,
    pub(super) rsdp: u64,
}

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file cannot be read.
    #[error("cannot read the {what} {}", path.display())]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is no kernel.
    #[error("{name} is not a kernel for x86-64: it is neither a bzImage nor an ELF file")]
    NotAKernel {
        /// The file.
        name: String,
    },
    /// A kernel that is broken.
    #[error("the kernel {name} {why}")]
    Broken {
        /// The file.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The loader gave up.
    #[error(
        "cannot load the kernel {name} (is the file whole, and does the guest have enough memory?)"
    )]
    Load {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The initrd has nothing in it.
    #[error("the initrd {} is empty", .0.display())]
    EmptyInitrd(PathBuf),
    /// Kernel and initrd do not fit into RAM.
    #[error("the kernel and the initrd need {} MiB of guest memory: give more by --memory", .need >> 20)]
    TooBig {
        /// Bytes of RAM that they need.
        need: u64,
    },
    /// The command line is too long.
    #[error("the command line has {0} bytes, a kernel takes {max} at most", max = layout::CMDLINE_SIZE - 1)]
    Cmdline(usize),
    /// The command line has a NUL in it.
    #[error("the command line has a NUL byte in it")]
    CmdlineNul,
    /// Something does not fit into RAM.
    #[error("cannot write {what} into guest memory")]
    Memory {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

impl Error {
    /// The error of writing `what`, for `map_err`.
    pub(super) fn writing(
        what: &'static str,
    ) -> impl Fn(vm_memory::GuestMemoryError) -> Self + Copy {
        move |source| Self::Memory { what, source }
    }
}

/// Loads what `boot` names, or the built-in tiny guest, and says how to enter it.
///
/// `rsdp` is the address of the ACPI tables' root, already in `ram`.
pub(crate) fn load(ram: &Ram, boot: &Boot, rsdp: u64) -> Result<Entry, Error> {
    let cmdline = boot.cmdline.as_deref().unwrap_or(DEFAULT_CMDLINE).to_owned().into_bytes();
    if cmdline.len() >= layout::CMDLINE_SIZE {
        return Err(Error::Cmdline(cmdline.len()));
    }
    if cmdline.contains(&0) {
        return Err(Error::CmdlineNul);
    }
    let kernel = match &boot.kernel {
        Some(path) => {
            let file = open("kernel", path)?;
            Kernel::load(ram, &path.display().to_string(), file)?
        }
        None => Kernel::load(ram, "the tiny guest", Cursor::new(resources::TINY_GUEST))?,
    };
    let initrd = match &boot.initrd {
        Some(path) => Some(load_initrd(ram, path, &kernel)?),
        None => None,
    };
    let loaded = Loaded { initrd, cmdline, rsdp };
    match kernel.entry {
        Entry::Pvh(_) => pvh::write_start_info(ram, &loaded)?,
        Entry::Linux64(_) => linux::write_zero_page(ram, &loaded, kernel.header)?,
    }
    Ok(kernel.entry)
}

/// A kernel in guest RAM.
struct Kernel {
    entry: Entry,
    /// The first byte after what it needs before it knows its memory.
    end: u64,
    /// Where an initrd has to end at the latest.
    initrd_limit: u64,
    header: setup_header,
}

impl Kernel {
    fn load<F: Read + ReadVolatile + Seek>(
        ram: &Ram,
        name: &str,
        mut image: F,
    ) -> Result<Self, Error> {
        let mut start = [0; 0x206];
        let read = read_up_to(&mut image, &mut start).map_err(|source| Error::Read {
            what: "kernel",
            path: name.into(),
            source,
        })?;
        let start = &start[..read];
        if start.is_empty() {
            return Err(Error::Broken { name: name.into(), why: "is an empty file" });
        }
        if start.starts_with(b"\x7fELF") {
            Self::load_elf(ram, name, start, image)
        } else if start.get(0x202..0x206) == Some(b"HdrS") {
            Self::load_bzimage(ram, name, image)
        } else {
            Err(Error::NotAKernel { name: name.into() })
        }
    }

    fn load_elf<F: Read + ReadVolatile + Seek>(
        ram: &Ram,
        name: &str,
        start: &[u8],
        mut image: F,
    ) -> Result<Self, Error> {
        let machine = start.get(18..20).map(|m| u16::from_le_bytes([m[0], m[1]]));
        if machine != Some(ELF_X86_64) {
            return Err(Error::NotAKernel { name: name.into() });
        }
        let himem = GuestAddress(layout::HIMEM);
        let loaded = Elf::load(ram, None, &mut image, Some(himem))
            .map_err(|source| Error::Load { name: name.into(), source })?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
            _ => Entry::Linux64(loaded.kernel_load.0),
        };
        Ok(Self {
            entry,
            end: loaded.kernel_end,
            initrd_limit: INITRD_LIMIT,
            header: setup_header::default(),
        })
    }

    fn load_bzimage<F: Read + ReadVolatile + Seek>(
        ram: &Ram,
        name: &str,
        mut image: F,
    ) -> Result<Self, Error> {
        let broken = |why| Error::Broken { name: name.to_owned(), why };
        let himem = GuestAddress(layout::HIMEM);
        let size = image.seek(SeekFrom::End(0)).map_err(|source| Error::Read {
            what: "kernel",
            path: name.into(),
            source,
        })?;
        let loaded = BzImage::load(ram, None, &mut image, Some(himem))
            .map_err(|source| Error::Load { name: name.into(), source })?;
        let header = loaded.setup_header.ok_or_else(|| broken("has no setup header"))?;
        if header.version < OLDEST_PROTOCOL {
            return Err(broken("is too old: Linux 3.8 or newer is needed"));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(broken("has no 64-bit entry: a 64-bit kernel is needed"));
        }
        let setup = (u64::from(header.setup_sects.max(1)) + 1) * 512;
        if size < setup + u64::from(header.syssize) * 16 {
            return Err(broken("is cut off: it is shorter than its header says"));
        }
        Ok(Self {
            entry: Entry::Linux64(loaded.kernel_load.0 + 0x200),
            end: header.pref_address.saturating_add(u64::from(header.init_size)),
            initrd_limit: u64::from(header.initrd_addr_max) + 1,
            header,
        })
    }
}

/// Puts the initrd as high as the kernel finds it, out of the kernel's way.
fn load_initrd(ram: &Ram, path: &Path, kernel: &Kernel) -> Result<(u64, u64), Error> {
    let mut file = open("initrd", path)?;
    let read_error = |source| Error::Read { what: "initrd", path: path.to_owned(), source };
    let size = file.seek(SeekFrom::End(0)).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    if size == 0 {
        return Err(Error::EmptyInitrd(path.to_owned()));
    }
    let low_end = migration::ram::layout(ram).first().map_or(0, |(_, len)| *len);
    let top = low_end.min(kernel.initrd_limit);
    let too_big = Error::TooBig { need: kernel.end.saturating_add(size) };
    let Some(start) = top.checked_sub(size).map(|start| start & !(PAGE - 1)) else {
        return Err(too_big);
    };
    if start < kernel.end {
        return Err(too_big);
    }
    let bytes = usize::try_from(size).expect("it fits below 4 GiB");
    ram.read_exact_volatile_from(GuestAddress(start), &mut file, bytes)
        .map_err(Error::writing("the initrd"))?;
    Ok((start, size))
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let error = |source| Error::Read { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_file() {
        Ok(file)
    } else {
        Err(error(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")))
    }
}

fn read_up_to(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
