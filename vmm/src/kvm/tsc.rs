//! The distance of a vCPU's time-stamp counter from the host's.

// UNSAFETY: the attribute's value goes through a pointer that the ioctl is given as an integer.
#![expect(unsafe_code, reason = "KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR take an address")]

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::Error;

vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
vmm_sys_util::ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// The attribute with its value at `value`.
fn offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.expose_provenance() as u64,
        flags: 0,
    }
}

/// What this vCPU's counter is ahead of the host's, modulo 2^64.
///
/// `None` where KVM does not tell, as older and software ones do not.
pub(crate) fn offset(fd: &VcpuFd) -> Result<Option<u64>, Error> {
    let mut value = 0;
    let attribute = offset_attribute(&raw mut value);
    // SAFETY: KVM looks at the attribute's name alone.
    if unsafe { ioctl_with_ref(fd, KVM_HAS_DEVICE_ATTR(), &attribute) } != 0 {
        return Ok(None);
    }
    // SAFETY: KVM writes the eight bytes of the value, which outlives the call.
    if unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(Error::last("KVM_GET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET"));
    }
    Ok(Some(value))
}

/// Moves this vCPU's counter to `offset` ahead of the host's.
pub(crate) fn set_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = offset_attribute(&raw mut offset);
    // SAFETY: KVM reads the eight bytes of the value, which outlives the call.
    if unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(Error::last("KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET"));
    }
    Ok(())
}
