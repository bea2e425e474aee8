//! The ring in which KVM tells of each page that one vCPU wrote, and that it is watched again.
//!
//! Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING: an entry is KVM's until it is dirty,
//! then this process's until it says that the entry is to be reset, then KVM's again.

// UNSAFETY: a ring is memory that is shared with the kernel, and kvm-ioctls has nothing for it.
#![expect(unsafe_code, reason = "memory that is shared with the kernel, and one ioctl")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO};
use kvm_ioctls::{VcpuFd, VmFd};
use migration::ram::PAGE;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::ioctl::ioctl;

use super::Error;

vmm_sys_util::ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// KVM_DIRTY_GFN_F_DIRTY: a page was written.
const DIRTY: u32 = 1;
/// KVM_DIRTY_GFN_F_RESET: that was taken note of.
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`.
#[derive(Debug, Default)]
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// Bytes of an entry.
pub(super) const ENTRY: usize = size_of::<Entry>();

impl Entry {
    fn has(&self, flag: u32) -> bool {
        // What was written to an entry before it became dirty is seen after that was.
        self.flags.load(Ordering::Acquire) & flag != 0
    }

    /// Has `each` take note of the page, and gives the entry back.
    fn take(&self, each: &mut impl FnMut(u32, u64)) {
        each(self.slot.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed));
        self.flags.store(RESET, Ordering::Release);
    }
}

/// The ring of one vCPU.
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<Entry>,
    count: usize,
    reader: Reader,
}

/// Where a ring is read.
///
/// A KVM that has a processor's help leaves some entries free. One that is software may let a vCPU
/// write many pages before it looks whether the ring is full, and then writes over the oldest
/// entries. That is found out, as is at which entry it is then.
#[derive(Debug, Default)]
struct Reader {
    /// The entry that KVM uses next.
    next: usize,
    /// The same before the last look, and how many entries that gave.
    since: (usize, usize),
    /// Whether KVM is at some entry behind `next`, because it wrote over entries.
    torn: bool,
    /// Whether it did so since this was last asked.
    overrun: bool,
}

// SAFETY: the mapping is this value's own, and there is nothing but atomics in it.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring of `vcpu`, whose VM has rings of `bytes`.
    pub(super) fn of(vcpu: &VcpuFd, bytes: usize) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let (access, at) =
            (ProtFlags::READ | ProtFlags::WRITE, u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE);
        // SAFETY: a new mapping, where the kernel finds room, harms nobody.
        let mapped = unsafe { mmap(null_mut(), bytes, access, MapFlags::SHARED, fd, at) }?;
        let entries = NonNull::new(mapped.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { entries, count: bytes / ENTRY, reader: Reader::default() })
    }

    /// Has `each` take note of every page written since the last time: its slot, and its number
    /// there. Gives how many entries are to be [reset](reset_all), when KVM watches them again.
    pub(super) fn take(&mut self, each: impl FnMut(u32, u64)) -> usize {
        let (entries, reader) = self.parts();
        reader.take(entries, each)
    }

    /// The same once more, if not all entries could be reset: how many more of them are to be.
    pub(super) fn take_again(&mut self, each: impl FnMut(u32, u64)) -> usize {
        let (entries, reader) = self.parts();
        reader.take_again(entries, each)
    }

    /// Whether pages were written, since this was last asked, that nobody took note of.
    pub(super) fn lost_some(&mut self) -> bool {
        std::mem::take(&mut self.reader.overrun)
    }

    fn parts(&mut self) -> (&[Entry], &mut Reader) {
        // SAFETY: so many entries are mapped for as long as `self` lives. They are atomics, which
        // hold whatever the kernel writes, and a page is aligned to them.
        let entries = unsafe { slice::from_raw_parts(self.entries.as_ptr(), self.count) };
        (entries, &mut self.reader)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.entries.as_ptr().cast(), self.count * ENTRY) } {
            tracing::error!(%error, "cannot unmap a dirty ring");
        }
    }
}

impl Reader {
    fn take(&mut self, entries: &[Entry], mut each: impl FnMut(u32, u64)) -> usize {
        let start = self.next;
        let taken = if self.torn {
            self.mend(entries, &mut each)
        } else {
            let (before, after) = entries.split_at(start);
            let dirty = |entry: &&Entry| entry.has(DIRTY) && !entry.has(RESET);
            let dirty = after.iter().chain(before).take_while(dirty);
            dirty.map(|entry| entry.take(&mut each)).count()
        };
        if taken == entries.len() {
            (self.torn, self.overrun) = (true, true);
        }
        self.next = (start + taken) % entries.len();
        self.since = (start, taken);
        taken
    }

    fn take_again(&mut self, entries: &[Entry], mut each: impl FnMut(u32, u64)) -> usize {
        let (start, taken) = self.since;
        let at = |entry: usize| &entries[(start + entry) % entries.len()];
        let left = (0..taken).find(|&entry| at(entry).has(DIRTY | RESET));
        let Some(reset) = left.filter(|&entry| at(entry).has(DIRTY)) else { return 0 };
        // KVM came round to an entry that it was about to be given back.
        self.next = (start + reset) % entries.len();
        let all = self.mend(entries, &mut each);
        (self.torn, self.overrun) = (true, true);
        self.since = (self.next, all);
        self.next = (self.next + all) % entries.len();
        all.saturating_sub(taken - reset)
    }

    /// Takes all that is new and gives back what lies before it: those entries were written over,
    /// and reset once too often.
    fn mend(&mut self, entries: &[Entry], each: &mut impl FnMut(u32, u64)) -> usize {
        let at = |entry: usize| &entries[(self.next + entry) % entries.len()];
        let Some(last) = (0..entries.len()).rev().find(|&entry| at(entry).has(DIRTY | RESET))
        else {
            return 0;
        };
        for entry in (0..=last).map(at) {
            if entry.has(DIRTY) {
                entry.take(each);
            } else if !entry.has(RESET) {
                entry.slot.store(0, Ordering::Relaxed);
                entry.offset.store(0, Ordering::Relaxed);
                entry.flags.store(RESET, Ordering::Release);
            }
        }
        self.torn = false;
        last + 1
    }
}

/// Has KVM watch all pages of which note was taken, and use their entries again: how many.
pub(super) fn reset_all(vm: &VmFd) -> Result<usize, Error> {
    // SAFETY: it takes nothing, and writes nothing but the rings, which are atomics.
    let reset = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    usize::try_from(reset).map_err(|_| Error::last("KVM_RESET_DIRTY_RINGS"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const COUNT: usize = 8;

    /// What the kernel does with a ring, which it may overrun.
    #[derive(Default)]
    struct Kernel {
        entries: [Entry; COUNT],
        /// How many entries it wrote, and how many of them it reset.
        wrote: usize,
        reset: usize,
    }

    impl Kernel {
        /// It looks before it has gone round twice.
        fn tell(&mut self, page: u64) {
            if self.wrote - self.reset == 2 * COUNT - 1 {
                return;
            }
            let entry = &self.entries[self.wrote % COUNT];
            entry.slot.store(1, Ordering::Relaxed);
            entry.offset.store(page, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.wrote += 1;
        }

        fn reset(&mut self) -> usize {
            let before = self.reset;
            while self.entries[self.reset % COUNT].has(RESET) {
                self.entries[self.reset % COUNT].flags.store(0, Ordering::Relaxed);
                self.reset += 1;
            }
            assert!(self.reset <= self.wrote, "more was given back than was taken");
            self.reset - before
        }

        /// Takes all; `meanwhile` so many pages are written from `next` on before the reset.
        fn harvest(&mut self, reader: &mut Reader, next: u64, meanwhile: u64) -> BTreeSet<u64> {
            let mut told = BTreeSet::new();
            let mut each = |slot, page| {
                if slot == 1 {
                    told.insert(page);
                }
            };
            let mut taken = reader.take(&self.entries, &mut each);
            (next..next + meanwhile).for_each(|page| self.tell(page));
            let mut reset = self.reset();
            if reset != taken {
                taken += reader.take_again(&self.entries, &mut each);
                reset += self.reset();
            }
            assert_eq!(reset, taken);
            told
        }
    }

    #[test]
    fn every_entry_is_taken_once_and_in_order_round_and_round() {
        let (mut kernel, mut reader) = (Kernel::default(), Reader::default());
        for lap in 0..7 {
            (lap * 10..lap * 10 + 5).for_each(|page| kernel.tell(page));
            let mut told = Vec::new();
            assert_eq!(reader.take(&kernel.entries, |_, page| told.push(page)), 5);
            assert_eq!(told, (lap * 10..lap * 10 + 5).collect::<Vec<_>>());
            let again = |slot, page| panic!("{slot} {page} was not reset yet");
            assert_eq!(reader.take(&kernel.entries, again), 0);
            assert_eq!(kernel.reset(), 5);
        }
        assert!(!reader.overrun);
    }

    proptest! {
        #[test]
        fn no_write_is_missed_in_silence_however_kvm_overruns_its_ring(
            turns in prop::collection::vec((0..20u64, prop_oneof![4 => Just(0), 1 => 0..20u64]), 1..40),
        ) {
            let (mut kernel, mut reader) = (Kernel::default(), Reader::default());
            let (mut next, mut due) = (0, BTreeSet::new());
            // And then none too many, so that it finds its place again.
            for (pages, meanwhile) in turns.into_iter().chain([(1, 0), (3, 0), (3, 0)]) {
                due.extend(next..next + pages);
                (next..next + pages).for_each(|page| kernel.tell(page));
                next += pages;
                let told = kernel.harvest(&mut reader, next, meanwhile);
                due.extend(next..next + meanwhile);
                next += meanwhile;
                if std::mem::take(&mut reader.overrun) {
                    due.clear();
                }
                let fresh = next - meanwhile..next;
                prop_assert!(due.iter().all(|page| told.contains(page) || fresh.contains(page)));
                due.retain(|page| !told.contains(page));
            }
            prop_assert!(!reader.torn && kernel.reset == kernel.wrote);
            prop_assert_eq!(reader.next, kernel.wrote % COUNT);
        }
    }
}
