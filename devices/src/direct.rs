//! Memory of the host that the guest reaches without anybody's help: what a device decodes.

// UNSAFETY: a mapping is made and removed by its address.
#![expect(unsafe_code, reason = "mmap and munmap take addresses")]

use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The granularity in which the guest can be given host memory, in bytes.
pub const PAGE: u64 = 4096;

/// Part of a file, usually a device's registers, mapped into this process as long as it exists.
///
/// Nothing here reads or writes it: reading a register may have effects, and both the device and
/// the guest change it at any time.
#[derive(Debug)]
pub struct HostMemory {
    address: *mut core::ffi::c_void,
    len: usize,
}

// SAFETY: the address is only handed on, and the mapping belongs to the process, not to a thread.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`; there is nothing to change through a shared reference.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// Either is not a multiple of [`PAGE`], or the file cannot be mapped there.
    pub fn map(file: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(PAGE) || !offset.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without an address of ours the kernel chooses one where nothing is mapped.
        let address =
            unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, file, offset) }?;
        Ok(Self { address, len })
    }

    /// Where it is in this process; it stays there until it is dropped.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address.expose_provenance() as u64
    }

    /// Bytes: a multiple of [`PAGE`], and not 0.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: `map` mapped exactly this, and whoever uses it holds a reference to `self`.
        if let Err(error) = unsafe { munmap(self.address, self.len) } {
            tracing::error!(%error, len = self.len, "cannot unmap a device's memory");
        }
    }
}

/// Who can put host memory into the guest's physical address space.
pub trait DirectMap: Send + Sync {
    /// Lets the guest reach `memory` at `at`, a multiple of [`PAGE`], until what is returned is
    /// dropped. It may be called with registers locked: it calls no device.
    ///
    /// # Errors
    /// When something else is there, or the machine has no more of them, or the host refuses.
    fn map(&self, at: u64, memory: &Arc<HostMemory>) -> io::Result<Box<dyn Mapped>>;
}

/// Host memory in the guest's address space. Dropping it takes it away, before the drop returns.
pub trait Mapped: Send + Sync {}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn only_whole_pages_of_a_file_can_be_mapped() {
        let file = memfd_create("direct", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 2 * PAGE).unwrap();
        let memory = HostMemory::map(&file, PAGE, PAGE).unwrap();
        assert_eq!(memory.len(), PAGE);
        assert!(memory.address().is_multiple_of(PAGE) && memory.address() != 0);
        for (offset, len) in [(0, 0), (0, 1), (1, PAGE), (PAGE, PAGE + 1)] {
            assert!(HostMemory::map(&file, offset, len).is_err(), "{offset} {len}");
        }
    }
}
