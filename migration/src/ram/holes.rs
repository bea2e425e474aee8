//! Where there is nothing at all, as the kernel knows without looking.

use std::fs::File;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::{PAGE, Ram, Run, backing};

/// Memory, and what is known of it.
///
/// What was never touched is zero, and reading it would only make the host find memory for it.
/// Where the memory is no file, or one that cannot tell, all counts as touched.
pub(super) struct Holes<'a> {
    ram: &'a Ram,
    /// Guest addresses where all was touched. To find the end of that, the kernel looks at each
    /// page: once must be enough.
    touched: Range<u64>,
}

impl<'a> Holes<'a> {
    /// Nothing is known yet.
    pub(super) fn of(ram: &'a Ram) -> Self {
        Self { ram, touched: 0..0 }
    }

    /// Divides `run` where pages that were never touched meet others: tells of each part whether it
    /// was touched.
    pub(super) fn parts(&mut self, run: Run) -> Vec<(Run, bool)> {
        let (mut parts, end) = (Vec::new(), run.start.0 + run.len);
        let mut start = run.start.0;
        while start < end {
            let (len, touched) = self.first_part(start, end - start);
            parts.push((Run { start: GuestAddress(start), len }, touched));
            start += len;
        }
        parts
    }

    /// How much of the `left` bytes at `start` is alike, and whether it was touched.
    fn first_part(&mut self, start: u64, left: u64) -> (u64, bool) {
        if !self.touched.contains(&start) {
            let Some((file, offset)) = backing(self.ram, GuestAddress(start)) else {
                return (left, true);
            };
            match untouched(file, offset, left) {
                0 => self.touched = start..start + until_hole(file, offset).unwrap_or(left),
                len => return (len, false),
            }
        }
        (left.min(self.touched.end - start), true)
    }
}

/// How much of the `left` bytes of `file` at `offset` is a hole.
fn untouched(file: &File, offset: u64, left: u64) -> u64 {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => (data.saturating_sub(offset) / PAGE * PAGE).min(left),
        Err(Errno::NXIO) => left,
        Err(_) => 0,
    }
}

/// How much of `file` at `offset`, where there is something, is no hole, if the kernel can tell.
fn until_hole(file: &File, offset: u64) -> Option<u64> {
    let hole = seek(file, SeekFrom::Hole(offset)).ok()?;
    Some(hole.saturating_sub(offset).next_multiple_of(PAGE).max(PAGE))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, FileOffset};

    use super::*;

    #[test]
    fn what_was_never_touched_is_told_without_touching_it() {
        let file =
            File::from(rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(20 * PAGE).unwrap();
        let size = usize::try_from(16 * PAGE).unwrap();
        let region = (GuestAddress(8 * PAGE), size, Some(FileOffset::new(file, 4 * PAGE)));
        let ram = Ram::from_ranges_with_files([region]).unwrap();
        let told = |first: u64, pages: u64| {
            let run = Run { start: GuestAddress(first * PAGE), len: pages * PAGE };
            let parts = Holes::of(&ram).parts(run).into_iter();
            let told = parts.map(|(run, touched)| (run.start.0 / PAGE, run.len / PAGE, touched));
            told.collect::<Vec<_>>()
        };
        assert_eq!(told(8, 16), [(8, 16, false)]);
        for page in [10, 11, 23] {
            ram.write_obj(0u8, GuestAddress(page * PAGE + 9)).unwrap();
        }
        let all = [(8, 2, false), (10, 2, true), (12, 11, false), (23, 1, true)];
        assert_eq!(told(8, 16), all);
        assert_eq!(told(11, 3), [(11, 1, true), (12, 2, false)]);
        assert_eq!(told(23, 1), [(23, 1, true)]);
    }

    #[test]
    fn what_was_found_once_is_known_and_no_more_than_that() {
        let file =
            File::from(rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(32 * PAGE).unwrap();
        let size = usize::try_from(16 * PAGE).unwrap();
        let offset = |pages: u64| FileOffset::new(file.try_clone().unwrap(), pages * PAGE);
        let far = 1 << 32;
        let low = (GuestAddress(0), size, Some(offset(0)));
        let high = (GuestAddress(far), size, Some(offset(16)));
        let ram = Ram::from_ranges_with_files([low, high]).unwrap();
        for page in (4..16).map(|page| page * PAGE).chain([far, far + PAGE]) {
            ram.write_obj(0u8, GuestAddress(page)).unwrap();
        }
        let mut holes = Holes::of(&ram);
        let mut told = |start: u64, pages: u64| {
            let parts = holes.parts(Run { start: GuestAddress(start), len: pages * PAGE });
            parts.iter().map(|(run, touched)| (run.len / PAGE, *touched)).collect::<Vec<_>>()
        };
        // In the file, what was touched goes on behind the end of the region.
        assert_eq!(told(0, 8), [(4, false), (4, true)]);
        assert_eq!(told(8 * PAGE, 8), [(8, true)]);
        assert_eq!(told(far, 4), [(2, true), (2, false)]);
        assert_eq!(told(far + 4 * PAGE, 12), [(12, false)]);
        assert_eq!(told(PAGE, 1), [(1, false)]);
    }

    #[test]
    fn memory_that_is_no_file_counts_as_touched() {
        let size = usize::try_from(3 * PAGE).unwrap();
        let ram = Ram::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let run = Run { start: GuestAddress(PAGE), len: 2 * PAGE };
        assert_eq!(Holes::of(&ram).parts(run), [(run, true)]);
    }
}
