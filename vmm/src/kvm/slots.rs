//! Host memory in the guest's address space beside its RAM, as memory slots of KVM.

// UNSAFETY: KVM takes the host address of the memory as an integer.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::direct::{DirectMap, HostMemory, Mapped, PAGE};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Cap;
use vm_memory::GuestMemoryBackend;

use super::Vm;
use super::routes::into_io;

/// The memory slots that RAM leaves.
#[derive(Clone)]
pub(crate) struct Slots(Arc<Table>);

struct Table {
    vm: Arc<Vm>,
    /// Where each slot in use begins and ends, by its number.
    used: Mutex<BTreeMap<u32, (u64, u64)>>,
}

impl Slots {
    /// The slots of `vm`.
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self(Arc::new(Table { vm, used: Mutex::default() }))
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, (u64, u64)>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a slot for the range.
    fn claim(&self, start: u64, len: u64) -> io::Result<u32> {
        let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if !start.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut used = self.lock();
        if used.values().any(|(other, other_end)| start < *other_end && *other < end) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let first = u32::try_from(self.vm.ram().num_regions()).map_err(io::Error::other)?;
        let all = self.vm.kvm().check_extension_int(Cap::NrMemslots);
        let all = u32::try_from(all).unwrap_or(0);
        let free = (first..all).find(|slot| !used.contains_key(slot));
        let slot = free.ok_or(io::ErrorKind::QuotaExceeded)?;
        used.insert(slot, (start, end));
        Ok(slot)
    }

    /// Tells KVM what is in a slot; a length of 0 empties it.
    fn set(&self, slot: u32, guest: u64, host: u64, len: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: `host` and `len` are of a `HostMemory`, a whole mapping, that the slot's
        // `MappedSlot` keeps until it has emptied the slot; RAM has other slots.
        unsafe { self.vm.fd().set_user_memory_region(region) }.map_err(into_io)
    }
}

impl DirectMap for Slots {
    fn map(&self, at: u64, memory: &Arc<HostMemory>) -> io::Result<Box<dyn Mapped>> {
        let slot = self.0.claim(at, memory.len())?;
        if let Err(error) = self.0.set(slot, at, memory.address(), memory.len()) {
            self.0.lock().remove(&slot);
            return Err(error);
        }
        let (table, memory) = (Arc::clone(&self.0), Arc::clone(memory));
        Ok(Box::new(MappedSlot { table, slot, at, memory }))
    }
}

/// A slot in use, and what is in it.
struct MappedSlot {
    table: Arc<Table>,
    slot: u32,
    at: u64,
    memory: Arc<HostMemory>,
}

impl Mapped for MappedSlot {}

impl Drop for MappedSlot {
    fn drop(&mut self) {
        let emptied = self.table.set(self.slot, self.at, self.memory.address(), 0);
        match emptied {
            Ok(()) => drop(self.table.lock().remove(&self.slot)),
            // The slot stays claimed, and what is in it stays mapped: nobody gets other memory.
            Err(error) => {
                tracing::error!(slot = self.slot, %error, "KVM_SET_USER_MEMORY_REGION");
                std::mem::forget(Arc::clone(&self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::config::DirtyTracking;
    use crate::memory;

    fn slots() -> Option<Slots> {
        let vm = Vm::new(memory::allocate(64 << 20, None).unwrap(), DirtyTracking::default());
        vm.map_err(|error| eprintln!("skipped: no usable KVM: {error}"))
            .ok()
            .map(|vm| Slots::new(Arc::new(vm)))
    }

    fn pages(count: u64) -> Arc<HostMemory> {
        let file = memfd_create("slot", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, count * PAGE).unwrap();
        Arc::new(HostMemory::map(&file, 0, count * PAGE).unwrap())
    }

    const BASE: u64 = 0xd000_0000;

    #[test]
    fn memory_is_in_the_guest_until_it_is_dropped() {
        let Some(slots) = slots() else { return };
        let memory = pages(4);
        let mapped = slots.map(BASE, &memory).unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        for at in [BASE, BASE + 3 * PAGE, BASE - PAGE] {
            let refused = slots.map(at, &pages(2)).err().unwrap();
            assert_eq!(refused.kind(), io::ErrorKind::AddrInUse, "{at:#x}");
        }
        let after = slots.map(BASE + 4 * PAGE, &pages(1)).unwrap();
        drop(mapped);
        assert_eq!(Arc::strong_count(&memory), 1);
        let again = slots.map(BASE + PAGE, &pages(2)).unwrap();
        drop((after, again));
        assert!(slots.0.lock().is_empty());
    }

    #[test]
    fn what_kvm_cannot_map_leaves_no_slot_behind() {
        let Some(slots) = slots() else { return };
        for at in [0, BASE + 1, u64::MAX - PAGE + 1] {
            assert!(slots.map(at, &pages(2)).is_err(), "{at:#x}: RAM is there, or nothing");
            assert!(slots.0.lock().is_empty());
        }
    }
}
