//! Guest RAM: one memory file, mapped here and shown to KVM.

// UNSAFETY: advice on a mapping is given by its address.
#![expect(unsafe_code, reason = "madvise takes an address")]

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::layout;
use crate::config::HugePages;

/// Guest RAM with a bitmap of the pages that the VMM itself wrote.
pub(crate) use migration::ram::Ram;

/// Why there is no RAM for the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The kernel gives no memory file of that size.
    #[error("cannot have {} MiB of guest memory{}", .bytes >> 20, remedy(*.hugepages))]
    Allocate {
        /// Bytes asked for.
        bytes: u64,
        /// The page size asked for.
        hugepages: Option<HugePages>,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The memory that another process passed is not what was asked for.
    #[error("cannot use the memory that was passed as {} MiB of guest memory: {why}", .bytes >> 20)]
    Adopt {
        /// Bytes asked for.
        bytes: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The memory file cannot be mapped.
    #[error("cannot map {} MiB of guest memory{}", .bytes >> 20, remedy(*.hugepages))]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The page size asked for.
        hugepages: Option<HugePages>,
        /// Why not.
        #[source]
        source: FromRangesError,
    },
}

fn remedy(hugepages: Option<HugePages>) -> &'static str {
    match hugepages {
        Some(_) => " in huge pages (reserve them: sysctl vm.nr_hugepages)",
        None => "",
    }
}

/// Makes `bytes` of zeroed RAM, laid out as the architecture has it.
///
/// The host's memory is taken page by page as the guest touches it.
pub(crate) fn allocate(bytes: u64, hugepages: Option<HugePages>) -> Result<Ram, Error> {
    let file = memory_file(bytes, hugepages).map_err(|source| Error::Allocate {
        bytes,
        hugepages,
        source,
    })?;
    map(&file, bytes, hugepages)
}

/// Maps the memory of a guest that another process passed here: `bytes` of it, laid out the same.
///
/// Writes nothing to it: that process may run the guest again. `hugepages` is what was asked for
/// here; without it, pages are of whatever size they are.
pub(crate) fn adopt(file: &File, bytes: u64, hugepages: Option<HugePages>) -> Result<Ram, Error> {
    let about = file.metadata().map_err(|source| Error::Allocate { bytes, hugepages, source })?;
    let wrong = |why| Error::Adopt { bytes, why };
    if about.len() != bytes {
        return Err(wrong(format!("it is {} bytes", about.len())));
    }
    if hugepages.is_some_and(|pages| pages.bytes() != about.blksize()) {
        return Err(wrong(format!("its pages are of {} bytes", about.blksize())));
    }
    map(file, bytes, hugepages)
}

fn map(file: &File, bytes: u64, hugepages: Option<HugePages>) -> Result<Ram, Error> {
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (start, len) in layout::ram_ranges(bytes) {
        let part =
            file.try_clone().map_err(|source| Error::Allocate { bytes, hugepages, source })?;
        let len_here = usize::try_from(len).map_err(|_| too_large(bytes, hugepages))?;
        ranges.push((GuestAddress(start), len_here, Some(FileOffset::new(part, offset))));
        offset += len;
    }
    let ram = Ram::from_ranges_with_files(ranges).map_err(|source| Error::Map {
        bytes,
        hugepages,
        source,
    })?;
    prefer_huge_pages(&ram);
    Ok(ram)
}

/// Lets the host back RAM by transparent huge pages, if its `shmem_enabled` says `advise`.
///
/// A guest then faults once for 2 MiB instead of once for 4 KiB.
fn prefer_huge_pages(ram: &Ram) {
    for region in ram.iter() {
        let len = usize::try_from(region.len()).expect("a mapped region is addressable");
        // SAFETY: the range is one whole mapping of `ram`; the advice changes none of its bytes.
        let advised = unsafe { madvise(region.as_ptr().cast(), len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no transparent huge pages");
        }
    }
}

fn memory_file(bytes: u64, hugepages: Option<HugePages>) -> io::Result<File> {
    let pages = match hugepages {
        None => MemfdFlags::empty(),
        Some(HugePages::Size2M) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::Size1G) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
    let file = File::from(memfd_create("guest-ram", flags)?);
    ftruncate(&file, bytes)?;
    // Whoever it is passed to can rely on its size.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn too_large(bytes: u64, hugepages: Option<HugePages>) -> Error {
    Error::Allocate { bytes, hugepages, source: io::ErrorKind::OutOfMemory.into() }
}
