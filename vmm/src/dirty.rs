//! Who writes guest memory while the guest is on its way out.

mod log;
mod ring;

use std::sync::Arc;

use migration::ram::{DirtySet, OwnWrites};

use crate::kvm::Vm;
use crate::vcpu::Vcpus;
use log::KvmLog;
use ring::KvmRings;

/// All that write the memory of `vm`, whose vCPUs are `vcpus`.
pub(crate) fn sources(vm: &Arc<Vm>, vcpus: &Arc<Vcpus>) -> DirtySet {
    let mut dirty = DirtySet::new();
    dirty.add(OwnWrites::new(vm.ram().clone()));
    // Last: what the others put into RAM, KVM may see too.
    if vm.has_dirty_rings() {
        dirty.add(KvmRings::new(vm.clone(), vcpus.clone()));
    } else {
        dirty.add(KvmLog::new(vm.clone()));
    }
    dirty
}
