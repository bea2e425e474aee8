//! Kicking a vCPU out of the guest, without a race.
//!
//! The signal is blocked everywhere but inside KVM_RUN, where KVM unblocks it atomically. So a
//! kick that comes before KVM_RUN makes it return at once, and no handler ever runs.

// UNSAFETY: kvm-ioctls has no KVM_SET_SIGNAL_MASK.
#![expect(unsafe_code, reason = "one ioctl that kvm-ioctls lacks")]

use kvm_bindings::{KVMIO, kvm_signal_mask};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::signal::{SIGRTMIN, block_signal, clear_signal};

vmm_sys_util::ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// The signal that is the kick: the first that nothing else uses.
pub(super) fn kick() -> i32 {
    SIGRTMIN()
}

/// `struct kvm_signal_mask` with the set that the kernel wants behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    blocked: [u8; 8],
}

/// Blocks the kick in this thread and all that it starts: before any thread is started.
pub(crate) fn block_kicks() -> Result<(), vmm_sys_util::signal::Error> {
    match block_signal(kick()) {
        Err(vmm_sys_util::signal::Error::SignalAlreadyBlocked(_)) => Ok(()),
        other => other,
    }
}

/// Unblocks the kick while the vCPU is in KVM_RUN; all other signals are for the main thread.
pub(super) fn let_kicks_in(fd: &VcpuFd) -> Result<(), errno::Error> {
    let bit = 1u64 << (kick() - 1);
    let mask = SignalMask { len: 8, blocked: (!bit).to_le_bytes() };
    // SAFETY: the structure has a length field and as many bytes behind it as that says.
    match unsafe { ioctl_with_ref(fd, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}

/// Takes a kick that has been seen out of the queue, so that KVM_RUN blocks again.
pub(super) fn take_kick() {
    if let Err(error) = clear_signal(kick()) {
        tracing::error!(?error, "cannot clear the kick signal");
    }
}
