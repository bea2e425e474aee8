//! Memory that another process has mapped too, and passes on as files.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE, PORTION, Ram};
use crate::compat::{Mismatch, Offer};

/// The most files that are passed as one memory.
pub(crate) const MOST_FILES: usize = 16;

/// The files that are all of `ram`, one behind the other as its regions are.
pub(crate) fn files_of(ram: &Ram) -> io::Result<Vec<File>> {
    let no = |why| io::Error::new(io::ErrorKind::Unsupported, why);
    let mut files: Vec<(File, u64)> = Vec::new();
    for region in ram.iter() {
        let part = region.file_offset().ok_or_else(|| no("it is no file"))?;
        let inode = |file: &File| file.metadata().map(|about| (about.dev(), about.ino()));
        let here = inode(part.file())?;
        match files.last_mut() {
            Some((file, used)) if inode(file)? == here && *used == part.start() => {
                *used += region.len();
            }
            _ if part.start() == 0 => files.push((part.file().try_clone()?, region.len())),
            _ => return Err(no("it is not in whole files")),
        }
    }
    if files.len() > MOST_FILES {
        return Err(no("it is in too many files"));
    }
    Ok(files.into_iter().map(|(file, _)| file).collect())
}

/// Checks that `files`, which a peer passed, can be the memory that `offer` tells of, for as long
/// as they are mapped: a file that shrinks would kill whoever touches what it was.
pub(crate) fn check(files: &[File], offer: &Offer) -> Result<(), Vec<Mismatch>> {
    let mut sum = 0_u64;
    for file in files {
        if !parts_portions(sum, &offer.ram) {
            return Err(refusal("files that end where a portion does", "one that does not"));
        }
        sum = sum.checked_add(size_of(file)?).ok_or_else(too_much)?;
    }
    let told = offer.ram.iter().try_fold(0_u64, |sum, (_, len)| sum.checked_add(*len));
    let told = told.ok_or_else(too_much)?;
    if told == sum {
        Ok(())
    } else {
        Err(refusal(&format!("{told} bytes"), &format!("files of {sum} bytes")))
    }
}

/// Whether memory in `ranges` can be divided behind its first `bytes`: else a region would end
/// within what is sent as one, were the guest to move on.
fn parts_portions(bytes: u64, ranges: &[(u64, u64)]) -> bool {
    let mut left = bytes;
    for (_, len) in ranges {
        if left <= *len {
            return left == *len || left.is_multiple_of(PORTION);
        }
        left -= len;
    }
    left == 0
}

fn too_much() -> Vec<Mismatch> {
    refusal("memory that an address reaches", "more than that")
}

/// The size of a file that will always have it.
fn size_of(file: &File) -> Result<u64, Vec<Mismatch>> {
    let sealed = "a memory file sealed against shrinking and growing";
    match fcntl_get_seals(file) {
        Ok(seals) if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) => {
            return Err(refusal(sealed, &format!("one with the seals {seals:?}")));
        }
        Ok(seals) if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) => {
            return Err(refusal("memory that can be written", "some that cannot"));
        }
        Ok(_) => {}
        Err(error) => return Err(refusal(sealed, &format!("something else ({error})"))),
    }
    let bytes = file.metadata().map_err(|error| refusal("a file", &error.to_string()))?.len();
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(refusal("a file of whole pages", &format!("one of {bytes} bytes")));
    }
    Ok(bytes)
}

fn refusal(wanted: &str, found: &str) -> Vec<Mismatch> {
    let remedy = "use the same uvmm on both sides, or migrate without shared memory";
    let [wanted, found, remedy] = [wanted, found, remedy].map(str::to_owned);
    vec![Mismatch { path: "memory/shared".into(), wanted, found, remedy }]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use vm_memory::{FileOffset, GuestAddress};

    use super::*;
    use crate::compat::Profile;

    const MIB: u64 = 1 << 20;

    fn memory(bytes: u64, seals: SealFlags) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("shared", flags).unwrap());
        file.set_len(bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn offer(ram: Vec<(u64, u64)>) -> Offer {
        Offer { name: "it".into(), config: vec![], profile: Profile::new(), ram }
    }

    #[test]
    fn only_sealed_files_of_the_right_size_are_taken() {
        let (shut, two) = (SealFlags::SHRINK | SealFlags::GROW, vec![(0, MIB), (4 * MIB, MIB)]);
        let offer = offer(two);
        check(&[memory(2 * MIB, shut)], &offer).unwrap();
        check(&[memory(2 * MIB, shut | SealFlags::SEAL)], &offer).unwrap();
        check(&[memory(MIB, shut), memory(MIB, shut)], &offer).unwrap();
        for (file, says) in [
            (memory(2 * MIB, SealFlags::SHRINK), "sealed against"),
            (memory(2 * MIB, SealFlags::empty()), "sealed against"),
            (memory(2 * MIB, shut | SealFlags::WRITE), "can be written"),
            (memory(2 * MIB, shut | SealFlags::FUTURE_WRITE), "can be written"),
            (memory(2 * MIB - 1, shut), "whole pages"),
            (memory(3 * MIB, shut), "2097152 bytes"),
            (memory(0, shut), "whole pages"),
            (tempfile::tempfile().unwrap(), "something else"),
            (File::open("/dev/zero").unwrap(), "something else"),
        ] {
            let told = |files: &[File]| check(files, &offer).unwrap_err()[0].to_string();
            let alone = told(std::slice::from_ref(&file));
            assert!(alone.contains(says), "{alone}");
            told(&[memory(2 * MIB, shut), file]);
        }
        check(&[], &offer).unwrap_err();
        check(&[memory(MIB / 2, shut), memory(3 * MIB / 2, shut)], &offer).unwrap_err();
    }

    #[test]
    fn files_end_where_portions_do() {
        let ranges = [(0, 5 * PORTION + PAGE), (1 << 32, 2 * PORTION)];
        for (bytes, parts) in [
            (0, true),
            (2 * PORTION, true),
            (2 * PORTION + PAGE, false),
            (5 * PORTION + PAGE, true),
            (6 * PORTION, false),
            (6 * PORTION + PAGE, true),
            (7 * PORTION + PAGE, true),
            (8 * PORTION + PAGE, false),
        ] {
            assert_eq!(parts_portions(bytes, &ranges), parts, "{bytes:#x}");
        }
    }

    #[test]
    fn memory_that_is_not_whole_files_in_order_is_not_passed() {
        let (file, size) = (memory(2 * MIB, SealFlags::empty()), usize::try_from(MIB).unwrap());
        let at = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let other = |offset| Some(FileOffset::new(memory(MIB, SealFlags::empty()), offset));
        let files = |parts: [Option<FileOffset>; 3]| {
            let starts = [0, MIB, 4 * MIB];
            let regions = starts.into_iter().zip(parts);
            let regions = regions.map(|(start, part)| (GuestAddress(start), size, part));
            files_of(&Ram::from_ranges_with_files(regions).unwrap()).map(|files| files.len())
        };
        assert_eq!(files([at(0), at(MIB), other(0)]).unwrap(), 2);
        assert_eq!(files([other(0), at(0), at(MIB)]).unwrap(), 2);
        files([at(MIB), at(0), other(0)]).unwrap_err();
        files([at(0), None, other(0)]).unwrap_err();
        files([at(0), other(0), at(MIB)]).unwrap_err();
    }

    proptest! {
        #[test]
        fn what_an_offer_tells_is_added_up_or_refused(lens: Vec<u64>) {
            let file = [memory(MIB, SealFlags::SHRINK | SealFlags::GROW)];
            let whole = lens.iter().try_fold(0_u64, |sum, len| sum.checked_add(*len)) == Some(MIB);
            let ram = lens.into_iter().map(|len| (0, len)).collect();
            prop_assert_eq!(check(&file, &offer(ram)).is_ok(), whole);
        }
    }
}
