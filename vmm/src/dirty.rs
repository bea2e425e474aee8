//! KVM's log of the pages that vCPUs, and KVM on their behalf, wrote.

use std::io;
use std::sync::Arc;

use migration::ram::{DirtySource, PageBitmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::Vm;

/// KVM's dirty log of a machine's whole RAM.
pub(crate) struct KvmLog {
    vm: Arc<Vm>,
}

impl KvmLog {
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self { vm }
    }
}

impl DirtySource for KvmLog {
    fn name(&self) -> &str {
        "KVM"
    }

    fn start(&mut self) -> io::Result<()> {
        self.vm.log_dirty_pages(true).map_err(io::Error::other)
    }

    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        for (slot, region) in (0..).zip(self.vm.ram().iter()) {
            let bytes = usize::try_from(region.len()).expect("a mapped region is addressable");
            let words = self.vm.dirty_log(slot, bytes).map_err(io::Error::other)?;
            pages.merge(region.start_addr(), &words)?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            tracing::warn!(%error, "cannot switch the dirty log off: the guest runs on, slower");
        }
    }
}
