//! Guest RAM: memory files, mapped here and shown to KVM.
//!
//! There are several, because a file lets in one writer at a time: where a guest arrives over
//! several connections, each begins with a file of its own.

// UNSAFETY: advice on a mapping is given by its address.
#![expect(unsafe_code, reason = "madvise takes an address")]

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use migration::ram::PORTION;
use migration::wire::MOST_STREAMS;
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

/// How many files guest RAM is in, as far as it is large enough: as many as there can be
/// connections.
const FILES: u64 = MOST_STREAMS as u64;

/// Makes `bytes` of zeroed RAM, laid out as the architecture has it.
///
/// The host's memory is taken page by page as the guest touches it.
pub(crate) fn allocate(bytes: u64, hugepages: Option<HugePages>) -> Result<Ram, Error> {
    // Both sizes are powers of two.
    let unit = hugepages.map_or(PORTION, |pages| pages.bytes().max(PORTION));
    let part = bytes.div_ceil(FILES).next_multiple_of(unit);
    let file = |index| {
        let size = part.min(bytes - index * part);
        memory_file(&format!("guest-ram-{index}"), size, hugepages)
    };
    let files: io::Result<Vec<_>> = (0..bytes.div_ceil(part)).map(file).collect();
    let files = files.map_err(|source| Error::Allocate { bytes, hugepages, source })?;
    map(&files, bytes, hugepages)
}

/// Maps the memory of a guest that another process passed here: `bytes` of it in `files`, laid out
/// the same, one behind the other.
///
/// Writes nothing to it: that process may run the guest again. `hugepages` is what was asked for
/// here; without it, pages are of whatever size they are.
pub(crate) fn adopt(
    files: &[File],
    bytes: u64,
    hugepages: Option<HugePages>,
) -> Result<Ram, Error> {
    let wrong = |why| Error::Adopt { bytes, why };
    for file in files {
        let about = file.metadata();
        let page = about.map_err(|source| Error::Allocate { bytes, hugepages, source })?.blksize();
        if hugepages.is_some_and(|pages| pages.bytes() != page) {
            return Err(wrong(format!("its pages are of {page} bytes")));
        }
    }
    map(files, bytes, hugepages)
}

fn map(files: &[File], bytes: u64, hugepages: Option<HugePages>) -> Result<Ram, Error> {
    let failed = |source| Error::Allocate { bytes, hugepages, source };
    let sizes: io::Result<Vec<_>> = files.iter().map(|file| Ok(file.metadata()?.len())).collect();
    let sizes = sizes.map_err(failed)?;
    let sum = sizes.iter().try_fold(0_u64, |sum, &size| sum.checked_add(size));
    if sum != Some(bytes) {
        return Err(Error::Adopt { bytes, why: format!("it is in files of {sizes:?} bytes") });
    }
    let mut regions = Vec::new();
    for Part { start, len, file, offset } in parts(&layout::ram_ranges(bytes), &sizes) {
        let len = usize::try_from(len).map_err(|_| too_large(bytes, hugepages))?;
        let file = files[file].try_clone().map_err(failed)?;
        regions.push((GuestAddress(start), len, Some(FileOffset::new(file, offset))));
    }
    let ram = Ram::from_ranges_with_files(regions);
    let ram = ram.map_err(|source| Error::Map { bytes, hugepages, source })?;
    prefer_huge_pages(&ram);
    Ok(ram)
}

/// What is in one range of RAM and in one file.
#[derive(Debug, PartialEq)]
struct Part {
    /// Guest-physical.
    start: u64,
    /// Bytes.
    len: u64,
    /// Which file.
    file: usize,
    /// Where in it.
    offset: u64,
}

/// Lays files of `sizes` bytes, one behind the other, over `ranges` of as many bytes.
fn parts(ranges: &[(u64, u64)], sizes: &[u64]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut ranges = ranges.iter().copied();
    let mut range = ranges.next();
    for (file, &size) in sizes.iter().enumerate() {
        let mut offset = 0;
        while let Some((start, left)) = range.filter(|_| offset < size) {
            let len = left.min(size - offset);
            parts.push(Part { start, len, file, offset });
            offset += len;
            range = if len < left { Some((start + len, left - len)) } else { ranges.next() };
        }
    }
    parts
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

fn memory_file(name: &str, bytes: u64, hugepages: Option<HugePages>) -> io::Result<File> {
    let pages = match hugepages {
        None => MemfdFlags::empty(),
        Some(HugePages::Size2M) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::Size1G) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
    let file = File::from(memfd_create(name, flags)?);
    ftruncate(&file, bytes)?;
    // Whoever it is passed to can rely on its size.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn too_large(bytes: u64, hugepages: Option<HugePages>) -> Error {
    Error::Allocate { bytes, hugepages, source: io::ErrorKind::OutOfMemory.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn sizes(bytes: u64) -> Vec<u64> {
        let ram = allocate(bytes, None).unwrap();
        let lens = ram.iter().map(|region| region.len() / MIB);
        lens.collect()
    }

    #[test]
    fn memory_is_in_several_files_of_which_none_is_small_without_need() {
        assert_eq!(sizes(1024 * MIB), [64; 16]);
        assert_eq!(sizes(100 * MIB), [16, 16, 16, 16, 16, 16, 4]);
        assert_eq!(sizes(3 * MIB), [3]);
        let large = [&[320; 9][..], &[192, 128], &[320; 6]].concat();
        assert_eq!(sizes(5120 * MIB), large);
    }

    #[test]
    fn memory_that_was_passed_is_laid_out_as_it_was() {
        let files = |sizes: &[u64]| {
            let file = |&size: &u64| memory_file("ram", size * MIB, None).unwrap();
            sizes.iter().map(file).collect::<Vec<_>>()
        };
        let adopted = adopt(&files(&[16, 48]), 64 * MIB, None).unwrap();
        let regions =
            adopted.iter().map(|region| (region.start_addr().0 / MIB, region.len() / MIB));
        assert_eq!(regions.collect::<Vec<_>>(), [(0, 16), (16, 48)]);
        for wrong in [&[16, 47][..], &[64, 1], &[]] {
            let error = adopt(&files(wrong), 64 * MIB, None).unwrap_err();
            assert!(matches!(error, Error::Adopt { .. }), "{wrong:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn files_cover_ranges_whatever_their_sizes(
            cuts in prop::collection::vec(0..100_u64, 0..6),
            hole in 0..100_u64,
        ) {
            let mut cuts = [vec![0, 100], cuts].concat();
            cuts.sort_unstable();
            let sizes: Vec<_> = cuts.windows(2).map(|cut| cut[1] - cut[0]).collect();
            let ranges = [(0, hole), (1000 + hole, 100 - hole)].map(|(start, len)| (start, len));
            let ranges: Vec<_> = ranges.into_iter().filter(|(_, len)| *len > 0).collect();
            let mut byte = 0;
            for part in parts(&ranges, &sizes) {
                prop_assert!(part.len > 0);
                prop_assert_eq!(part.start, if byte < hole { byte } else { 1000 + byte });
                prop_assert!(byte >= hole || byte + part.len <= hole, "the hole is left out");
                let before: u64 = sizes[..part.file].iter().sum();
                prop_assert_eq!(before + part.offset, byte);
                prop_assert!(part.offset + part.len <= sizes[part.file]);
                byte += part.len;
            }
            prop_assert_eq!(byte, 100);
        }
    }
}
