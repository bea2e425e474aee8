//! The virtual machine: its file descriptor, its memory slots and its interrupt controllers.

// UNSAFETY: KVM takes the host address of guest RAM as an integer.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION takes an address")]

use std::ops::Range;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::harvest::{self, Rings};
use super::{Error, dirty_log};
use crate::arch::layout;
use crate::config::DirtyTracking;
use crate::memory::Ram;

/// A KVM virtual machine with RAM and in-kernel interrupt controllers.
///
/// It keeps the RAM mapped for as long as it exists.
#[derive(Debug)]
pub(crate) struct Vm {
    kvm: Kvm,
    fd: VmFd,
    ram: Ram,
    clears_dirty_log: bool,
    /// Where writes are logged in rings.
    pub(super) rings: Option<Rings>,
}

/// What KVM must offer; everything else is asked for where it is used.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::Pit2, "an in-kernel timer"),
    (Cap::UserMemory, "user memory regions"),
    (Cap::AdjustClock, "an adjustable clock"),
    (Cap::ImmediateExit, "immediate exits"),
    (Cap::Irqfd, "interrupts by eventfd"),
    (Cap::MpState, "the vCPUs' multi-processor state"),
];

impl Vm {
    /// Makes a virtual machine with `ram` in it and no vCPU yet, that can log writes to it by
    /// `tracking`.
    pub(crate) fn new(ram: Ram, tracking: DirtyTracking) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::Open)?;
        if let Some((_, what)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Error::Lacks(what));
        }
        let fd = kvm.create_vm().map_err(Error::ioctl("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(Error::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::TSS).map_err(Error::ioctl("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(Error::ioctl("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(Error::ioctl("KVM_CREATE_PIT2"))?;
        // A log by hand that starts full protects nothing at first: a ring would miss writes.
        let (clears_dirty_log, rings) = match tracking {
            DirtyTracking::Log => (dirty_log::by_hand(&fd), None),
            DirtyTracking::Ring => (false, Some(harvest::enable(&fd, &ram)?)),
        };
        let vm = Self { kvm, fd, ram, clears_dirty_log, rings };
        vm.map_ram(false)?;
        Ok(vm)
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The memory above all RAM that PCI functions may decode, if vCPUs whose physical addresses
    /// have `address_bits` reach that far.
    pub(crate) fn pci_memory_64(&self, address_bits: u8) -> Option<Range<u64>> {
        let bytes = self.ram.iter().map(GuestMemoryRegion::len).sum();
        layout::pci_memory_64(bytes, address_bits)
    }

    /// Whether vCPUs whose physical addresses have `bits` reach all RAM.
    pub(crate) fn check_reach(&self, bits: u8) -> Result<(), Error> {
        let end = self.ram.iter().map(|region| region.start_addr().0 + region.len()).max();
        let reach = 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
        match end {
            Some(end) if end > reach => Err(Error::AddressBits { end, bits }),
            _ => Ok(()),
        }
    }

    /// Makes the vCPU `index`, each once and in order.
    pub(crate) fn create_vcpu(&self, index: u8) -> Result<VcpuFd, Error> {
        let vcpu = self.fd.create_vcpu(u64::from(index));
        let vcpu = vcpu.map_err(Error::ioctl("KVM_CREATE_VCPU"))?;
        if let Some(rings) = &self.rings {
            rings.add(&vcpu)?;
        }
        Ok(vcpu)
    }

    /// Whether KVM's dirty log keeps every bit until it is told to clear it.
    pub(crate) fn clears_dirty_log(&self) -> bool {
        self.clears_dirty_log
    }

    /// Puts RAM into its memory slots, with a log of the pages that are written or without.
    pub(super) fn map_ram(&self, log_dirty: bool) -> Result<(), Error> {
        for (slot, region) in (0..).zip(self.ram.iter()) {
            let host = region.as_ptr().expose_provenance() as u64;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host,
            };
            // SAFETY: the range is the whole mapping of a region of `ram`, which lives as long
            // as `self`, and so at least as long as the VM's file descriptor.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(Error::ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}
