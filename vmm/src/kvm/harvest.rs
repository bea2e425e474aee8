//! What KVM's dirty rings told of: the pages that vCPUs wrote, and how many each of them.
//!
//! Whoever holds a [`Harvest`] holds all that was written before, and KVM watches all of those
//! pages again: what is written to them from then on is for the next harvest.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use migration::ram::{PAGE, PageBitmap, Ram, Window};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::ring::{self, ENTRY, Ring};
use super::{Error, Vm};

/// Bytes of a ring, if KVM lets it be so large: full after 64 MiB of writes.
const RING: usize = ENTRY << 14;
/// The least that is of use: KVM keeps more than 500 entries for itself.
const LEAST_RING: usize = ENTRY << 10;
/// How often KVM is asked to reset what it may leave for the next time, as when a signal comes.
const TRIES: usize = 16;

/// The rings of a machine's vCPUs.
#[derive(Debug)]
pub(super) struct Rings {
    /// Of each ring.
    bytes: usize,
    harvest: Mutex<Harvest>,
}

/// What was taken from the rings.
#[derive(Debug)]
pub(crate) struct Harvest {
    /// By the number of the vCPU.
    rings: Vec<Ring>,
    log: Log,
}

/// What the rings told.
#[derive(Debug)]
struct Log {
    /// First address and size in pages of each memory slot that is RAM, by its number.
    slots: Vec<(u64, u64)>,
    pages: PageBitmap,
    /// How many pages became dirty by each vCPU.
    by_vcpu: Vec<u64>,
    /// A page that there is not.
    stray: Option<(u32, u64)>,
}

/// Has `vm`, which has no vCPU yet, log the writes to `ram` in rings.
pub(super) fn enable(vm: &VmFd, ram: &Ram) -> Result<Rings, Error> {
    let offer = |cap: u32| size(vm.check_extension_raw(cap.into())).map(|bytes| (cap, bytes));
    let offered = offer(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).or_else(|| offer(KVM_CAP_DIRTY_LOG_RING));
    let (cap, bytes) = offered.ok_or(Error::NoDirtyRing)?;
    let request = kvm_enable_cap { cap, args: [bytes as u64, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&request).map_err(Error::ioctl("KVM_CAP_DIRTY_LOG_RING"))?;
    let harvest = Mutex::new(Harvest { rings: Vec::new(), log: Log::of(ram) });
    Ok(Rings { bytes, harvest })
}

/// Bytes of a ring where KVM lets it have `offered`; none where it is too small to be one.
fn size(offered: i32) -> Option<usize> {
    let offered = usize::try_from(offered).ok().and_then(usize::checked_ilog2)?;
    let bytes = RING.min(1 << offered);
    (bytes >= LEAST_RING).then_some(bytes)
}

impl Rings {
    /// Takes the ring of `vcpu` in, which is the next by number.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let ring = Ring::of(vcpu, self.bytes).map_err(Error::DirtyRing)?;
        let mut harvest = self.lock();
        harvest.rings.push(ring);
        harvest.log.by_vcpu.push(0);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Harvest> {
        self.harvest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    /// Whether writes are logged in rings.
    pub(crate) fn has_dirty_rings(&self) -> bool {
        self.rings.is_some()
    }

    /// Takes what is in the rings. Nothing is while there is no log.
    ///
    /// What a vCPU wrote that is in KVM_RUN may come to its ring when it leaves.
    pub(crate) fn harvest(&self) -> Result<MutexGuard<'_, Harvest>, Error> {
        let mut harvest = self.rings.as_ref().ok_or(Error::NoDirtyRing)?.lock();
        let Harvest { rings, log } = &mut *harvest;
        let mut all = |take: fn(&mut Ring, &mut dyn FnMut(u32, u64)) -> usize| -> usize {
            let rings = rings.iter_mut().enumerate();
            rings.map(|(vcpu, ring)| take(ring, &mut |slot, page| log.note(vcpu, slot, page))).sum()
        };
        let mut taken = all(|ring, each| ring.take(each));
        let mut reset = ring::reset_all(self.fd())?;
        for _ in 0..TRIES {
            if reset == taken {
                break;
            }
            taken += all(|ring, each| ring.take_again(each));
            reset += ring::reset_all(self.fd())?;
        }
        if reset != taken {
            return Err(Error::DirtyRingsStuck { taken, reset });
        }
        if harvest.rings.iter_mut().fold(false, |lost, ring| ring.lost_some() | lost) {
            harvest.log.pages = PageBitmap::full(self.ram());
            tracing::warn!(
                "this KVM lost track of writes in a dirty ring: all memory counts as written"
            );
        }
        Ok(harvest)
    }
}

impl Harvest {
    /// Adds to `pages` all that there is since the last time.
    ///
    /// Fails if KVM told of a page that there is not: then it cannot be known what was written.
    pub(crate) fn take(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        pages.unite(&self.log.pages);
        self.log.pages.clear();
        self.log.stray.take().map_or(Ok(()), |(slot, page)| {
            let why = format!("KVM tells of page {page} of memory slot {slot}, which is none");
            Err(io::Error::new(io::ErrorKind::InvalidData, why))
        })
    }

    /// How many pages became dirty by each vCPU since the last time.
    pub(crate) fn take_counts(&mut self) -> Vec<u64> {
        self.log.by_vcpu.iter_mut().map(std::mem::take).collect()
    }

    /// Forgets the writes to the pages of `window`.
    pub(crate) fn forget(&mut self, window: &Window<'_>) {
        self.log.pages.subtract(window);
    }

    /// Forgets all that there is.
    pub(crate) fn clear(&mut self) {
        self.log.pages.clear();
        self.log.by_vcpu.fill(0);
        self.log.stray = None;
    }
}

impl Log {
    fn of(ram: &Ram) -> Self {
        let slots = ram.iter().map(|region| (region.start_addr().0, region.len() / PAGE));
        Self {
            slots: slots.collect(),
            pages: PageBitmap::empty(ram),
            by_vcpu: Vec::new(),
            stray: None,
        }
    }

    /// Takes note of a page that `vcpu` wrote. KVM may tell of one several times.
    fn note(&mut self, vcpu: usize, slot: u32, page: u64) {
        let known = usize::try_from(slot).ok().and_then(|slot| self.slots.get(slot));
        match known {
            Some(&(start, pages)) if page < pages => {
                if self.pages.add(GuestAddress(start + page * PAGE)) {
                    self.by_vcpu[vcpu] += 1;
                }
            }
            _ => self.stray = Some((slot, page)),
        }
    }
}

#[cfg(test)]
mod tests;
