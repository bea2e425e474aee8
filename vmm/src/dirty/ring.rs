//! KVM's dirty rings: the pages that each vCPU wrote.

use std::io;
use std::sync::Arc;

use migration::ram::{DirtySource, PageBitmap, Window};

use crate::kvm::Vm;
use crate::vcpu::Vcpus;

/// The dirty rings of all vCPUs of a machine.
///
/// They are emptied, and KVM watches the pages again, when they are read, when a part of memory is
/// about to be sent, and when one is full. To start, KVM has to watch all memory at once.
pub(super) struct KvmRings {
    vm: Arc<Vm>,
    vcpus: Arc<Vcpus>,
    by_vcpu: Vec<u64>,
}

impl KvmRings {
    pub(super) fn new(vm: Arc<Vm>, vcpus: Arc<Vcpus>) -> Self {
        Self { vm, vcpus, by_vcpu: Vec::new() }
    }
}

impl DirtySource for KvmRings {
    fn name(&self) -> &str {
        "KVM"
    }

    fn start(&mut self) -> io::Result<()> {
        // What an earlier log left behind; nothing is added to that before the next is on.
        self.vm.harvest().map_err(io::Error::other)?.clear();
        self.vm.log_dirty_pages(true).map_err(io::Error::other)
    }

    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        self.vcpus.step_out().map_err(io::Error::other)?;
        let mut harvest = self.vm.harvest().map_err(io::Error::other)?;
        self.by_vcpu = harvest.take_counts();
        harvest.take(pages)
    }

    fn by_vcpu(&self) -> &[u64] {
        &self.by_vcpu
    }

    fn forget(&mut self, pages: &Window<'_>) -> io::Result<()> {
        // What a vCPU wrote and its ring does not tell yet is sent again: that costs less than to
        // have all of them leave the guest.
        self.vm.harvest().map_err(io::Error::other)?.forget(pages);
        Ok(())
    }

    fn stop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            tracing::warn!(%error, "cannot switch the dirty log off: the guest runs on, slower");
        }
    }
}
