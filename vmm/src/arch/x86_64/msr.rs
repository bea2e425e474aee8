//! Model-specific registers: what a vCPU starts with, and which belong to its state.

use std::collections::BTreeSet;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::feature::Features;
use crate::kvm::Error;

/// The time-stamp counter.
pub(crate) const TSC: u32 = 0x10;
/// The deadline of the local APIC's timer, in TSC ticks; 0 when none is armed.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
/// What the processor is not vulnerable to, among other things.
pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
/// What its performance counters can do.
pub(super) const PERF_CAPABILITIES: u32 = 0x345;
const MTRR_CAP: u32 = 0xfe;
const MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MCG_CAP: u32 = 0x179;

/// Written before the first instruction, as a PC's firmware would.
const AT_BOOT: [(u32, u64); 2] = [
    // Fast strings.
    (MISC_ENABLE, 1),
    // MTRRs on, everything write-back; the hole for devices is KVM's business.
    (MTRR_DEF_TYPE, 1 << 11 | 6),
];

/// Guest-visible registers that KVM keeps but leaves out of its index list.
fn unlisted() -> impl Iterator<Item = u32> {
    let variable_ranges = 0x200..0x210;
    let fixed_ranges = [0x250, 0x258, 0x259].into_iter().chain(0x268..0x270);
    variable_ranges.chain(fixed_ranges).chain([MTRR_DEF_TYPE])
}

/// Registers by which a guest tells KVM where in its memory to write what: clocks, stolen time,
/// page faults to come (kernel: virt/kvm/x86/msr.rst). KVM may write as soon as they are set, also
/// from here.
pub(crate) fn writes_memory(index: u32) -> bool {
    matches!(index, 0x11 | 0x12 | 0x4b56_4d00..=0x4b56_4dff)
}

/// Registers on the list that describe the host or that KVM derives from others.
fn is_derived(index: u32) -> bool {
    // Hyper-V's registers exist only for guests that were told of Hyper-V: none of ours.
    matches!(index, MTRR_CAP | MCG_CAP | 0x4000_0000..=0x4000_01ff)
}

/// The indices that make up a vCPU's state on this host, the deadline last: it counts only in
/// deadline mode.
pub(crate) fn of_state(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let listed = kvm.get_msr_index_list().map_err(Error::ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let indices: BTreeSet<u32> =
        listed.as_slice().iter().copied().filter(|&i| !is_derived(i)).chain(unlisted()).collect();
    let (deadline, others): (Vec<_>, Vec<_>) =
        indices.into_iter().partition(|&i| i == TSC_DEADLINE);
    Ok(others.into_iter().chain(deadline).collect())
}

/// Those of [`of_state`] that a guest can have which `cpuid` is for: KVM gives its user some that
/// it hides from the guest.
pub(crate) fn of_guest(kvm: &Kvm, cpuid: &CpuId) -> Result<Vec<u32>, Error> {
    let features = Features::of(cpuid);
    let has = |name| features.has(Features::named(name));
    let mut indices = of_state(kvm)?;
    indices.retain(|&index| match index {
        ARCH_CAPABILITIES => has("arch_capabilities"),
        PERF_CAPABILITIES => has("pdcm"),
        _ => true,
    });
    Ok(indices)
}

/// Reads those of `indices` that this vCPU has.
///
/// KVM stops at the first register that it refuses; that one the guest does not have, by its
/// CPUID, so it is no part of the state.
pub(crate) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(|_| Error::TooManyMsrs(asked.len()))?;
        let read = fd.get_msrs(&mut msrs).map_err(Error::ioctl("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)));
        rest = rest.get(read + 1..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Writes `values` in their order.
///
/// # Errors
/// Names the register that KVM refuses. One that is refused and was zero does not matter: a
/// register that this host lacks reads as zero.
pub(crate) fn write(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| Error::TooManyMsrs(entries.len()))?;
        let written = fd.set_msrs(&msrs).map_err(Error::ioctl("KVM_SET_MSRS"))?;
        match rest.get(written) {
            Some(&(index, value)) if value != 0 => return Err(Error::MsrRefused { index, value }),
            _ => rest = rest.get(written + 1..).unwrap_or(&[]),
        }
    }
    Ok(())
}

/// Gives a new vCPU the registers that firmware would have set.
pub(crate) fn reset(fd: &VcpuFd) -> Result<(), Error> {
    write(fd, &AT_BOOT)
}
