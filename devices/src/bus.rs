//! Who answers at which address, for port I/O as for memory-mapped I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Something that answers accesses of the guest.
///
/// Any vCPU may call at any time: a device locks its own registers. The guest chooses offset and
/// length; the bus promises only that an access lies within the range that was inserted.
pub trait BusDevice: Send + Sync {
    /// Reads at `offset` from the start of the range; `data` comes filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range cannot be inserted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// Another device answers there.
    #[error("{size} bytes at {base:#x} overlap the {other_size} bytes at {other_base:#x}")]
    Overlap {
        /// Where the refused range begins.
        base: u64,
        /// How long it is, in bytes.
        size: u64,
        /// Where the range in its way begins.
        other_base: u64,
        /// How long that is, in bytes.
        other_size: u64,
    },
    /// The range is empty or passes the end of the address space.
    #[error("{size} bytes at {base:#x} are no range of addresses")]
    Range {
        /// Where the refused range begins.
        base: u64,
        /// How long it is, in bytes.
        size: u64,
    },
}

#[derive(Clone)]
struct Entry {
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space of devices.
///
/// No lock is held while a device is called, so a device may insert and remove ranges itself.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// A bus where nobody answers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer `size` bytes from `base` on.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let Some(last) = size.checked_sub(1).and_then(|span| base.checked_add(span)) else {
            return Err(BusError::Range { base, size });
        };
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        // Ranges do not overlap, so only the last one that begins before our end can reach us.
        if let Some((&other_base, other)) = ranges.range(..=last).next_back()
            && other_base + (other.size - 1) >= base
        {
            return Err(BusError::Overlap { base, size, other_base, other_size: other.size });
        }
        ranges.insert(base, Entry { size, device });
        Ok(())
    }

    /// Removes the range that begins at `base`; says whether there was one.
    ///
    /// An access that began before may still be running when this returns.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Reads for the guest; all ones where no one device answers all of the access.
    ///
    /// Says whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.read(offset, data);
        true
    }

    /// Writes for the guest; nothing happens where no one device answers all of the access.
    ///
    /// Says whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.write(offset, data);
        true
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        let left = entry.size.checked_sub(offset)?;
        let fits = u64::try_from(length).is_ok_and(|length| length <= left);
        fits.then(|| (offset, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, Weak};

    use proptest::prelude::*;

    use super::*;

    /// Answers with its number and remembers what was written.
    struct Probe(u8, Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(u8::try_from(offset).unwrap()));
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.1.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn probe(number: u8) -> Arc<Probe> {
        Arc::new(Probe(number, Mutex::default()))
    }

    #[test]
    fn an_access_reaches_its_device_with_the_offset() {
        let bus = Bus::new();
        let device = probe(0x10);
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x3fd, &mut data));
        assert_eq!(data, [0x15]);
        assert!(bus.write(0x3ff, &[7]));
        assert_eq!(*device.1.lock().unwrap(), [(7, vec![7])]);
    }

    #[test]
    fn what_nobody_claims_reads_as_ones() {
        let bus = Bus::new();
        bus.insert(0x600, 4, probe(0)).unwrap();
        for (address, length) in [(0x5ff, 1), (0x604, 1), (0x603, 2), (0x5ff, 2), (u64::MAX, 1)] {
            let mut data = vec![0; length];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert!(data.iter().all(|byte| *byte == 0xff));
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn overlapping_and_impossible_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, probe(0)).unwrap();
        for (base, size) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0x10f, 100), (0xf0, 0x100)] {
            let refused = bus.insert(base, size, probe(1));
            assert!(matches!(refused, Err(BusError::Overlap { .. })), "{base:#x}");
        }
        for (base, size) in [(0, 0), (2, u64::MAX)] {
            let refused = bus.insert(base, size, probe(1));
            assert_eq!(refused, Err(BusError::Range { base, size }));
        }
        bus.insert(0x110, 1, probe(1)).unwrap();
        bus.insert(0xff, 1, probe(1)).unwrap();
        assert!(bus.remove(0x100));
        assert!(!bus.remove(0x100));
        bus.insert(0x100, 0x10, probe(1)).unwrap();
    }

    #[test]
    fn the_end_of_the_address_space_can_be_claimed() {
        let bus = Bus::new();
        bus.insert(u64::MAX, 1, probe(3)).unwrap();
        bus.insert(0, u64::MAX, probe(4)).unwrap();
        let mut data = [0];
        assert!(bus.read(u64::MAX, &mut data));
        assert_eq!(data, [3]);
    }

    #[test]
    fn a_device_may_move_itself_while_it_is_accessed() {
        struct Mover(Weak<Bus>);
        impl BusDevice for Mover {
            fn read(&self, _: u64, _: &mut [u8]) {}
            fn write(&self, _: u64, _: &[u8]) {
                let bus = self.0.upgrade().unwrap();
                assert!(bus.remove(0x10));
                bus.insert(0x20, 1, probe(9)).unwrap();
            }
        }
        let bus = Arc::new(Bus::new());
        bus.insert(0x10, 1, Arc::new(Mover(Arc::downgrade(&bus)))).unwrap();
        bus.write(0x10, &[0]);
        assert!(bus.read(0x20, &mut [0]));
    }

    proptest! {
        #[test]
        fn every_address_has_one_owner_at_most(
            ranges in prop::collection::vec((0u8..64, 1u8..16), 0..12),
        ) {
            let bus = Bus::new();
            let mut answers = [None; 80];
            for (number, (base, size)) in (0u8..).map(|number| number * 20).zip(ranges) {
                let wanted = usize::from(base)..usize::from(base + size);
                let free = answers[wanted.clone()].iter().all(Option::is_none);
                let inserted = bus.insert(base.into(), size.into(), probe(number));
                prop_assert_eq!(inserted.is_ok(), free);
                if free {
                    for (answer, offset) in answers[wanted].iter_mut().zip(0..) {
                        *answer = Some(number + offset);
                    }
                }
            }
            for (address, answer) in (0u64..).zip(answers) {
                let mut data = [0];
                let answered = bus.read(address, &mut data);
                prop_assert_eq!(answered.then_some(data[0]), answer);
            }
        }
    }
}
