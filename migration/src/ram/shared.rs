//! Memory that another process has mapped too, and passes on as a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Ram;
use crate::compat::{Mismatch, Offer};

/// The file that is all of `ram`: its regions in order, one behind the other.
pub(crate) fn file_of(ram: &Ram) -> io::Result<File> {
    let no = |why| io::Error::new(io::ErrorKind::Unsupported, why);
    let (mut first, mut next) = (None, 0);
    for region in ram.iter() {
        let part = region.file_offset().ok_or_else(|| no("it is no file"))?;
        let about = part.file().metadata()?;
        let (_, inode) = first.get_or_insert((part.file(), (about.dev(), about.ino())));
        if *inode != (about.dev(), about.ino()) || part.start() != next {
            return Err(no("it is not one file"));
        }
        next += region.len();
    }
    first.ok_or_else(|| no("there is none"))?.0.try_clone()
}

/// Checks that `file`, which a peer passed, can be the memory that `offer` tells of, for as long as
/// it is mapped: a file that shrinks would kill whoever touches what it was.
pub(crate) fn check(file: &File, offer: &Offer) -> Result<(), Vec<Mismatch>> {
    let refusal = |wanted: String, found: String| {
        let remedy = "use the same uvmm on both sides, or migrate without shared memory".into();
        Err(vec![Mismatch { path: "memory/shared".into(), wanted, found, remedy }])
    };
    let sealed = "a memory file sealed against shrinking and growing".to_owned();
    match fcntl_get_seals(file) {
        Ok(seals) if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) => {
            return refusal(sealed, format!("one with the seals {seals:?}"));
        }
        Ok(seals) if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) => {
            return refusal("memory that can be written".into(), "some that cannot".into());
        }
        Ok(_) => {}
        Err(error) => return refusal(sealed, format!("something else ({error})")),
    }
    let told = offer.ram.iter().try_fold(0_u64, |sum, (_, len)| sum.checked_add(*len));
    match (told, file.metadata()) {
        (Some(told), Ok(about)) if about.len() == told => Ok(()),
        (Some(told), Ok(about)) => {
            refusal(format!("{told} bytes"), format!("a file of {} bytes", about.len()))
        }
        (None, _) => refusal("memory that an address reaches".into(), "more than that".into()),
        (_, Err(error)) => refusal("a file".into(), error.to_string()),
    }
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
    fn only_a_sealed_file_of_the_right_size_is_taken() {
        let (shut, two) = (SealFlags::SHRINK | SealFlags::GROW, vec![(0, MIB), (4 * MIB, MIB)]);
        let offer = offer(two);
        check(&memory(2 * MIB, shut), &offer).unwrap();
        check(&memory(2 * MIB, shut | SealFlags::SEAL), &offer).unwrap();
        for (file, says) in [
            (memory(2 * MIB, SealFlags::SHRINK), "sealed against"),
            (memory(2 * MIB, SealFlags::empty()), "sealed against"),
            (memory(2 * MIB, shut | SealFlags::WRITE), "can be written"),
            (memory(2 * MIB, shut | SealFlags::FUTURE_WRITE), "can be written"),
            (memory(2 * MIB - 1, shut), "2097152 bytes"),
            (memory(3 * MIB, shut), "2097152 bytes"),
            (tempfile::tempfile().unwrap(), "something else"),
            (File::open("/dev/zero").unwrap(), "something else"),
        ] {
            let told = check(&file, &offer).unwrap_err()[0].to_string();
            assert!(told.contains(says), "{told}");
        }
    }

    #[test]
    fn memory_that_is_not_one_file_in_order_is_not_passed() {
        let (file, size) = (memory(2 * MIB, SealFlags::empty()), usize::try_from(MIB).unwrap());
        let at = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let ram = |parts: [Option<FileOffset>; 2]| {
            let [low, high] = parts;
            let regions = [(GuestAddress(0), size, low), (GuestAddress(4 * MIB), size, high)];
            Ram::from_ranges_with_files(regions).unwrap()
        };
        file_of(&ram([at(0), at(MIB)])).unwrap();
        file_of(&ram([at(MIB), at(0)])).unwrap_err();
        file_of(&ram([at(0), None])).unwrap_err();
        let other = FileOffset::new(memory(2 * MIB, SealFlags::empty()), MIB);
        file_of(&ram([at(0), Some(other)])).unwrap_err();
    }

    proptest! {
        #[test]
        fn what_an_offer_tells_is_added_up_or_refused(lens: Vec<u64>) {
            let file = memory(MIB, SealFlags::SHRINK | SealFlags::GROW);
            let whole = lens.iter().try_fold(0_u64, |sum, len| sum.checked_add(*len)) == Some(MIB);
            let ram = lens.into_iter().map(|len| (0, len)).collect();
            prop_assert_eq!(check(&file, &offer(ram)).is_ok(), whole);
        }
    }
}
