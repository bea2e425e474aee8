//! KVM's dirty log of RAM: on and off, read, and cleared bit by bit where the kernel can.
//!
//! Documentation/virt/kvm/api.rst, 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the log then
//! leaves it as it is, and starting it sets every bit, which write-protects nothing.

// UNSAFETY: kvm-ioctls has no KVM_CLEAR_DIRTY_LOG.
#![expect(unsafe_code, reason = "one ioctl that kvm-ioctls lacks")]

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Error, Vm};

vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Bits in a word of the log.
const WORD: usize = u64::BITS as usize;

/// Asks for a log that is cleared by hand, all set at first if the kernel can: whether it is.
pub(super) fn by_hand(fd: &VmFd) -> bool {
    let offered = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let offered = u32::try_from(offered).unwrap_or(0);
    if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return false;
    }
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let args = [u64::from(offered & wanted), 0, 0, 0];
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let enabled = fd.enable_cap(&kvm_enable_cap { cap, args, ..Default::default() });
    enabled.inspect_err(|error| tracing::debug!(%error, "no dirty log by hand")).is_ok()
}

impl Vm {
    /// Switches the log of all RAM on or off.
    pub(crate) fn log_dirty_pages(&self, on: bool) -> Result<(), Error> {
        self.map_ram(on)
    }

    /// Calls KVM_GET_DIRTY_LOG for the RAM region `slot`: a bit for every page written since it
    /// was cleared, in words of 64 pages. Clears all of them, unless the log
    /// [is cleared by hand](Vm::clears_dirty_log).
    pub(crate) fn dirty_log(&self, slot: u32, bytes: usize) -> Result<Vec<u64>, Error> {
        self.fd().get_dirty_log(slot, bytes).map_err(Error::ioctl("KVM_GET_DIRTY_LOG"))
    }

    /// Calls KVM_CLEAR_DIRTY_LOG for `pages` pages of the RAM region `slot` from the page `first`
    /// on: a bit that is set in `words` is cleared, and the next write to that page sets it again.
    ///
    /// `first` is a multiple of 64, and so is `pages` unless the region ends there.
    ///
    /// # Panics
    /// If there are not as many words as the pages need.
    pub(crate) fn clear_dirty_log(
        &self,
        slot: u32,
        first: u64,
        pages: usize,
        words: &[u64],
    ) -> Result<(), Error> {
        const NAME: &str = "KVM_CLEAR_DIRTY_LOG";
        assert_eq!(words.len(), pages.div_ceil(WORD), "a bit for each page");
        let num_pages = u32::try_from(pages).map_err(|_| Error::ioctl(NAME)(einval()))?;
        let dirty_bitmap = words.as_ptr().cast_mut().cast();
        let request = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
        };
        // SAFETY: KVM reads a bit for each of `num_pages`, in whole words, which `words` has, and
        // writes nothing.
        match unsafe { ioctl_with_ref(self.fd(), KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(Error::last(NAME)),
        }
    }
}

fn einval() -> kvm_ioctls::Error {
    kvm_ioctls::Error::new(libc::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DirtyTracking;
    use crate::memory;

    #[test]
    fn a_log_that_is_cleared_by_hand_starts_full_and_keeps_what_is_not_cleared() {
        const BYTES: usize = 16 << 20; // one region
        let vm = match Vm::new(
            memory::allocate(BYTES as u64, None).unwrap(),
            DirtyTracking::default(),
        ) {
            Ok(vm) => vm,
            Err(error) => return eprintln!("skipped: no usable KVM: {error}"),
        };
        if !vm.clears_dirty_log() {
            return eprintln!("skipped: this KVM cannot clear its dirty log by hand");
        }
        for _ in 0..2 {
            vm.log_dirty_pages(true).unwrap();
            assert!(vm.dirty_log(0, BYTES).unwrap().iter().all(|&word| word == u64::MAX));
            vm.clear_dirty_log(0, 64, 128, &[u64::MAX, 5]).unwrap();
            for _ in 0..2 {
                let log = vm.dirty_log(0, BYTES).unwrap();
                assert_eq!(log[..4], [u64::MAX, 0, !5, u64::MAX]);
            }
            assert!(vm.clear_dirty_log(0, 1, 64, &[1]).is_err(), "not a whole word");
            assert!(vm.clear_dirty_log(9, 0, 64, &[1]).is_err(), "no such slot");
            vm.log_dirty_pages(false).unwrap();
            assert!(vm.dirty_log(0, BYTES).is_err(), "it is off");
        }
    }
}
