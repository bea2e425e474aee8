//! What the devices of one guest can reach by DMA: all of its RAM, and nothing else.

// UNSAFETY: memory is opened to DMA by its address.
#![expect(unsafe_code, reason = "VFIO_IOMMU_MAP_DMA takes an address")]

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use iommufd_ioctls::IommuFd;
use migration::ram::Ram;
use rustix::process::{Resource, getrlimit};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError, VfioIommufd, VfioOps};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::Error;
use super::host::{HostDevice, Way};

/// Whether VFIO can drive this host's IOMMU for devices that are had by their groups.
///
/// # Errors
/// What stands in the way.
pub fn check_container() -> Result<(), Error> {
    VfioContainer::new(None).map(drop).map_err(Error::of_container)
}

/// The address space of all VFIO devices of one guest: guest-physical addresses.
///
/// Guest RAM is locked in memory while there is a device, and only then.
pub struct Container {
    ram: Ram,
    tracker: Option<Arc<VfioDeviceFd>>,
    reach: Mutex<Weak<Reach>>,
}

/// Guest RAM, open to DMA until this is dropped.
pub(super) struct Reach {
    vfio: Arc<dyn VfioOps>,
    ram: Ram,
    /// How many regions of `ram` are mapped.
    mapped: usize,
}

impl Container {
    /// For a guest whose memory is `ram`. `tracker` is KVM's own knowledge of the guest's devices,
    /// which some need (the kernel's `virt/kvm/devices/vfio.rst`).
    #[must_use]
    pub fn new(ram: Ram, tracker: Option<Arc<VfioDeviceFd>>) -> Self {
        Self { ram, tracker, reach: Mutex::default() }
    }

    /// Opens the device and guest RAM to it.
    pub(super) fn open(&self, host: &HostDevice) -> Result<(VfioDevice, Arc<Reach>), Error> {
        // Held all along: the container has an address space only once it has a device.
        let mut weak = self.reach.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reach) = weak.upgrade() {
            let device = open_in(&host.path, reach.vfio.clone()).map_err(|e| host.refused(e))?;
            return Ok((device, reach));
        }
        let vfio = self.address_space(host)?;
        let device = open_in(&host.path, vfio.clone()).map_err(|e| host.refused(e))?;
        let reach = Arc::new(Reach::open(vfio, self.ram.clone())?);
        *weak = Arc::downgrade(&reach);
        Ok((device, reach))
    }

    /// An address space for `host` and for devices that come later, which has nothing in it.
    fn address_space(&self, host: &HostDevice) -> Result<Arc<dyn VfioOps>, Error> {
        let tracker = self.tracker.clone();
        match host.way() {
            Some(Way::Own(_)) => {
                let iommu = IommuFd::new().map_err(VfioError::NewVfioIommufd);
                let space =
                    iommu.and_then(|iommu| VfioIommufd::new(Arc::new(iommu), None, tracker));
                Ok(Arc::new(space.map_err(Error::Container)?))
            }
            Some(Way::Group(_)) | None => {
                Ok(Arc::new(VfioContainer::new(tracker).map_err(Error::of_container)?))
            }
        }
    }
}

fn open_in(path: &Path, vfio: Arc<dyn VfioOps>) -> Result<VfioDevice, VfioError> {
    VfioDevice::new(path, vfio, true)
}

impl Reach {
    fn open(vfio: Arc<dyn VfioOps>, ram: Ram) -> Result<Self, Error> {
        let needed = ram.iter().map(GuestMemoryRegion::len).sum();
        // From here on its drop removes what is there.
        let mut reach = Self { vfio, ram, mapped: 0 };
        for (start, host, len) in ranges(&reach.ram) {
            // SAFETY: the range is a whole mapping of guest RAM, which is only ever accessed as
            // memory that somebody else changes; `reach` keeps it mapped until it has closed it.
            let mapped = unsafe { reach.vfio.vfio_dma_map(start, len, host) };
            mapped.map_err(|source| Error::Dma {
                needed,
                limit: getrlimit(Resource::Memlock).current,
                source,
            })?;
            reach.mapped += 1;
        }
        Ok(reach)
    }
}

/// Guest-physical start, host address and length of each region.
fn ranges(ram: &Ram) -> Vec<(u64, *mut u8, usize)> {
    let range = |region: &vm_memory::GuestRegionMmap<_>| {
        let len = usize::try_from(region.len()).expect("a mapped region is addressable");
        (region.start_addr().0, region.as_ptr(), len)
    };
    ram.iter().map(range).collect()
}

impl Drop for Reach {
    fn drop(&mut self) {
        for (start, _, len) in ranges(&self.ram).into_iter().take(self.mapped) {
            if let Err(error) = self.vfio.vfio_dma_unmap(start, len) {
                tracing::error!(start, len, %error, "guest memory stays open to DMA");
            }
        }
    }
}
