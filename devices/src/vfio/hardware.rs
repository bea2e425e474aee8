//! A device as VFIO shows it: regions, interrupts and a reset (the kernel's `linux/vfio.h`).

// UNSAFETY: ioctls take addresses, and VFIO's file is borrowed by its number.
#![expect(unsafe_code, reason = "VFIO_DEVICE_SET_IRQS takes an address")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio;
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::container::Reach;
use crate::direct::HostMemory;
use crate::pci::registers::{COMMAND, command};

// VFIO_TYPE, and VFIO_BASE + n.
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, 0x3b, 110);
ioctl_io_nr!(VFIO_DEVICE_RESET, 0x3b, 111);

/// The region of configuration space; those of base address registers have the same numbers.
pub(super) const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;

/// A kind of interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Interrupt {
    /// The pin. It is masked each time it is signalled, until it is unmasked.
    Intx,
    Msi,
    Msix,
    /// The device had an error that cannot be corrected.
    Error,
    /// The host wants the device back.
    Request,
}

impl Interrupt {
    fn index(self) -> u32 {
        match self {
            Self::Intx => vfio::VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => vfio::VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => vfio::VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => vfio::VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => vfio::VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// Part of a device that is accessed by offset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Bytes; 0 where there is no such region.
    pub(super) size: u64,
    /// What of it can be mapped.
    pub(super) mappable: Vec<Range<u64>>,
}

/// What a function needs of the device behind it.
pub(super) trait Hardware: Send + Sync {
    fn region(&self, region: u32) -> Region;
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Maps part of a region; the range is within what is mappable.
    fn map(&self, region: u32, range: Range<u64>) -> io::Result<HostMemory>;
    /// How many interrupts of a kind it has.
    fn interrupts(&self, kind: Interrupt) -> u32;
    /// Lets interrupts from number `start` on signal `eventfds`, or nothing.
    ///
    /// Those of the first call for a kind are all that there are until they are disabled.
    fn signal(&self, kind: Interrupt, start: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()>;
    /// Switches off all interrupts of a kind. Of those for the guest, one kind may be on.
    fn disable(&self, kind: Interrupt) -> io::Result<()>;
    /// Unmasks the pin each time `eventfd` is signalled. Not every driver can.
    fn unmask_by(&self, eventfd: &EventFd) -> io::Result<()>;
    /// Unmasks the pin now.
    fn unmask(&self) -> io::Result<()>;
    fn can_reset(&self) -> bool;
    fn reset(&self) -> io::Result<()>;
}

/// A device that the kernel's VFIO has.
pub(super) struct VfioHardware {
    // Dropped first: the container has an address space only while it has a device.
    _reach: Arc<Reach>,
    can_reset: bool,
    device: VfioDevice,
}

impl VfioHardware {
    pub(super) fn new(device: VfioDevice, reach: Arc<Reach>) -> Self {
        let mut hardware = Self { _reach: reach, can_reset: true, device };
        // Also begins with a device that no former user left its traces in.
        hardware.can_reset = hardware.reset().is_ok();
        hardware
    }

    fn file(&self) -> BorrowedFd<'_> {
        // SAFETY: the device keeps its file open for as long as it is borrowed here.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }

    /// The place of an access in VFIO's file, if the region has it.
    fn at(&self, region: u32, offset: u64, len: usize) -> io::Result<u64> {
        let size = self.device.get_region_size(region);
        let left = size.saturating_sub(offset);
        if len as u64 <= left {
            Ok(self.device.get_region_offset(region) + offset)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    /// Calls VFIO_DEVICE_SET_IRQS with `data` after its header, counting `count` interrupts.
    fn set_irqs(
        &self,
        kind: Interrupt,
        flags: u32,
        start: u32,
        count: usize,
        data: &[i32],
    ) -> io::Result<()> {
        let header = size_of::<vfio::vfio_irq_set>();
        let narrow = |number: usize| u32::try_from(number).map_err(io::Error::other);
        let size = narrow(header + size_of_val(data))?;
        let mut words = vec![size, flags, kind.index(), start, narrow(count)?];
        words.extend(data.iter().map(|fd| fd.cast_unsigned()));
        // SAFETY: `words` has the layout of the structure, whose members are all 32 bits wide, and
        // says how long it is; the kernel only reads it.
        let result =
            unsafe { ioctl_with_ptr(&self.file(), VFIO_DEVICE_SET_IRQS(), words.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// How often a reset is tried while the host itself is at the device, and for how long it waits.
const RESETS: u32 = 20;
const BETWEEN_RESETS: std::time::Duration = std::time::Duration::from_millis(10);

impl Hardware for VfioHardware {
    fn region(&self, region: u32) -> Region {
        let size = self.device.get_region_size(region);
        let flags = self.device.get_region_flags(region);
        let accessible = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
        if flags & (accessible | vfio::VFIO_REGION_INFO_FLAG_MMAP) == 0 {
            return Region::default();
        }
        let sparse = self.device.get_region_caps(region).into_iter().find_map(|cap| match cap {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        let mappable = match sparse {
            _ if flags & vfio::VFIO_REGION_INFO_FLAG_MMAP == 0 => Vec::new(),
            Some(areas) => {
                let range = |offset: u64, len| offset..offset.saturating_add(len).min(size);
                areas.into_iter().map(|area| range(area.offset, area.size)).collect()
            }
            None => std::iter::once(0..size).collect(),
        };
        Region { size, mappable }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.at(region, offset, data.len())?;
        let count = rustix::io::pread(self.file(), &mut *data, at)?;
        if count == data.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.at(region, offset, data.len())?;
        let count = rustix::io::pwrite(self.file(), data, at)?;
        if count == data.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn map(&self, region: u32, range: Range<u64>) -> io::Result<HostMemory> {
        let at = self.at(region, range.start, 0)?;
        HostMemory::map(self.file(), at, range.end - range.start)
    }

    fn interrupts(&self, kind: Interrupt) -> u32 {
        self.device.get_irq_info(kind.index()).map_or(0, |info| info.count)
    }

    fn signal(&self, kind: Interrupt, start: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        let number = |eventfd: &Option<&EventFd>| eventfd.map_or(-1, AsRawFd::as_raw_fd);
        let numbers: Vec<_> = eventfds.iter().map(number).collect();
        self.set_irqs(kind, flags, start, numbers.len(), &numbers)
    }

    fn disable(&self, kind: Interrupt) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(kind, flags, 0, 0, &[])
    }

    fn unmask_by(&self, eventfd: &EventFd) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(Interrupt::Intx, flags, 0, 1, &[eventfd.as_raw_fd()])
    }

    fn unmask(&self) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(Interrupt::Intx, flags, 0, 1, &[])
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        let mut tries = 0;
        loop {
            // SAFETY: the ioctl takes no argument.
            if unsafe { ioctl(&self.file(), VFIO_DEVICE_RESET()) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            tries += 1;
            if error.kind() != io::ErrorKind::WouldBlock || tries == RESETS {
                return Err(error);
            }
            std::thread::sleep(BETWEEN_RESETS);
        }
    }
}

impl Drop for VfioHardware {
    /// A device that was used by a guest stops all DMA before guest memory is closed to it.
    fn drop(&mut self) {
        if self.can_reset {
            match self.reset() {
                Ok(()) => return,
                Err(error) => tracing::warn!(%error, "cannot reset a device that is given back"),
            }
        }
        let command = command::IO | command::MEMORY;
        if let Err(error) = self.write(CONFIG, COMMAND.into(), &command.to_le_bytes()) {
            tracing::warn!(%error, "cannot keep a device that is given back from DMA");
        }
    }
}
