//! KVM's log of the pages that vCPUs, and KVM on their behalf, wrote.

use std::io;
use std::sync::Arc;

use migration::ram::{DirtySource, PAGE, PageBitmap, Ram, Window};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::kvm::Vm;

type GuestRegion = <Ram as GuestMemoryBackend>::R;

/// KVM's dirty log of a machine's whole RAM.
///
/// Where the kernel can, reading it clears nothing: a page is cleared when it is about to be sent,
/// and none is protected from writes before.
pub(super) struct KvmLog {
    vm: Arc<Vm>,
}

impl KvmLog {
    pub(super) fn new(vm: Arc<Vm>) -> Self {
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

    fn forget(&mut self, pages: &Window<'_>) -> io::Result<()> {
        if !self.vm.clears_dirty_log() {
            return Ok(()); // it was cleared when it was read
        }
        let holds = |(_, region): &(u32, &GuestRegion)| {
            let offset = pages.start.0.checked_sub(region.start_addr().0);
            offset.is_some_and(|offset| offset < region.len())
        };
        let (slot, region) =
            (0..).zip(self.vm.ram().iter()).find(holds).ok_or(io::ErrorKind::InvalidInput)?;
        let first = (pages.start.0 - region.start_addr().0) / PAGE;
        let cleared = self.vm.clear_dirty_log(slot, first, pages.pages, pages.words);
        cleared.map_err(io::Error::other)
    }

    fn stop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            tracing::warn!(%error, "cannot switch the dirty log off: the guest runs on, slower");
        }
    }
}
