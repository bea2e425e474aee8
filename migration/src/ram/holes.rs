//! Where there is nothing at all, as the kernel knows without looking.

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::{PAGE, Ram, Run, backing};

/// Divides `run` of `ram` where pages that were never touched meet others: tells of each part
/// whether it was touched.
///
/// What was never touched is zero, and reading it would only make the host find memory for it.
/// Where the memory is no file, or one that cannot tell, all counts as touched.
pub(super) fn parts(ram: &Ram, run: Run) -> impl Iterator<Item = (Run, bool)> + '_ {
    let file = backing(ram, run.start);
    let (mut done, mut known) = (0, false);
    std::iter::from_fn(move || {
        let left = run.len - done;
        if left == 0 {
            return None;
        }
        let start = GuestAddress(run.start.0 + done);
        let (len, touched) = match file {
            Some((file, offset)) if known => (until_hole(file, offset + done, left), true),
            Some((file, offset)) => first_part(file, offset + done, left),
            None => (left, true),
        };
        done += len;
        known = !touched; // behind a hole there is what ends it
        Some((Run { start, len }, touched))
    })
}

/// How much of the `left` bytes of `file` at `offset` is alike, and whether it was touched.
fn first_part(file: &File, offset: u64, left: u64) -> (u64, bool) {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data / PAGE > offset / PAGE => {
            (((data - offset) / PAGE * PAGE).min(left), false)
        }
        Ok(_) => (until_hole(file, offset, left), true),
        Err(Errno::NXIO) => (left, false),
        Err(_) => (left, true),
    }
}

/// How much of the `left` bytes of `file` at `offset`, where there is something, is no hole.
fn until_hole(file: &File, offset: u64, left: u64) -> u64 {
    let hole = seek(file, SeekFrom::Hole(offset));
    hole.map_or(left, |hole| hole.saturating_sub(offset).next_multiple_of(PAGE).clamp(PAGE, left))
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
            let told = parts(&ram, run)
                .map(|(run, touched)| (run.start.0 / PAGE, run.len / PAGE, touched));
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
    fn memory_that_is_no_file_counts_as_touched() {
        let size = usize::try_from(3 * PAGE).unwrap();
        let ram = Ram::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let run = Run { start: GuestAddress(PAGE), len: 2 * PAGE };
        assert_eq!(parts(&ram, run).collect::<Vec<_>>(), [(run, true)]);
    }
}
