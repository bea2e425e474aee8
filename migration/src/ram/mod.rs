//! Guest memory as pages: which ones changed, and moving them.

mod arrivals;
mod bitmap;
mod dirty;
mod holes;
pub(crate) mod receive;
pub(crate) mod send;
pub(crate) mod shared;

use std::fs::File;

pub use bitmap::{PageBitmap, Run, Window};
pub use dirty::{DirtyError, DirtySet, DirtySource, OwnWrites};
pub(crate) use shared::MOST_FILES;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Size in bytes of the pages that the engine counts in, whatever backs them.
pub const PAGE: u64 = PAGE_BYTES as u64;
pub(crate) const PAGE_BYTES: usize = 4096;

/// Bytes of memory that are sent as one portion: no frame with content crosses a multiple of this
/// from the start of a range of the guest's memory.
///
/// So a destination may divide memory into regions there, whatever the source does.
pub const PORTION: u64 = 16 << 20;

/// The memory of a guest, in regions of whole pages.
///
/// Its bitmap remembers what this process itself wrote through `vm-memory`: the source reads it as
/// one more dirty source ([`OwnWrites`]), the destination knows from it which pages are still the
/// zeros they were allocated as. Whoever writes through raw pointers marks the bitmap itself.
pub type Ram = GuestMemoryMmap<AtomicBitmap>;

/// The file behind `start`, and the offset in it; none where memory is no file.
fn backing(ram: &Ram, start: GuestAddress) -> Option<(&File, u64)> {
    let (region, address) = ram.to_region_addr(start)?;
    let file = region.file_offset()?;
    Some((file.file(), file.start() + address.0))
}

/// Where in the guest there is memory, as start and length in bytes, by address.
///
/// How it is divided into regions and files is each host's own business.
#[must_use]
pub fn layout(ram: &Ram) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for region in ram.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        match ranges.last_mut() {
            Some((first, before)) if *first + *before == start => *before += len,
            _ => ranges.push((start, len)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_touch_are_one_range() {
        let regions = [(0, 1), (1, 2), (4, 1), (5, 1), (7, 1)];
        let regions = regions.map(|(page, pages)| (GuestAddress(page * PAGE), pages * PAGE_BYTES));
        let ranges = [(0, 3 * PAGE), (4 * PAGE, 2 * PAGE), (7 * PAGE, PAGE)];
        assert_eq!(layout(&Ram::from_ranges(&regions).unwrap()), ranges);
    }
}
