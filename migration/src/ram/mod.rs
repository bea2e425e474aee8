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
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Size in bytes of the pages that the engine counts in, whatever backs them.
pub const PAGE: u64 = PAGE_BYTES as u64;
pub(crate) const PAGE_BYTES: usize = 4096;

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

/// Start and length in bytes of each region of `ram`, by address.
#[must_use]
pub fn layout(ram: &Ram) -> Vec<(u64, u64)> {
    ram.iter().map(|region| (region.start_addr().0, region.len())).collect()
}
