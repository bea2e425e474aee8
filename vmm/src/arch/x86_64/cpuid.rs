//! What the guest's CPUID instruction answers.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::feature::Features;
use crate::kvm::Error;

/// Leaf 1, ECX: VMX.
const VMX: u32 = 1 << 5;
/// Leaf 1, ECX: the local APIC timer has a TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX\[23:16\] counts the logical processors of the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: SVM.
const SVM: u32 = 1 << 2;
/// Leaf 0x8000_0001, ECX: EBX and ECX of leaf 0x8000_001e describe the topology.
const TOPOEXT: u32 = 1 << 22;

/// KVM's own leaf, and in its EAX: page faults that the host completes later
/// (`KVM_FEATURE_ASYNC_PF`, `_ASYNC_PF_VMEXIT` and `_ASYNC_PF_INT`).
const KVM_FEATURES: u32 = 0x4000_0001;
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// How many bits a physical address has on processors that `cpuid` tells of.
pub(crate) fn address_bits(cpuid: &CpuId) -> u8 {
    /// What a processor without that leaf has (AMD APM 3, E.4.8).
    const LEAST: u8 = 36;
    leaf(cpuid, 0x8000_0008, 0).map_or(LEAST, |leaf| leaf.eax.to_le_bytes()[0])
}

/// What `cpuid` answers to `function` in EAX and `index` in ECX, if it has such a leaf.
pub(super) fn leaf(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).copied()
}

/// What this host can show a guest of ours: what its KVM supports, and what it shows on `vcpu`
/// besides, which must be new.
///
/// A KVM that runs guests without the processor's help cannot hide features that programs ask the
/// processor itself for: it shows them though it was not told to, and does not list them.
pub(crate) fn host(kvm: &Kvm, vcpu: &VcpuFd) -> Result<CpuId, Error> {
    let mut cpuid = supported(kvm)?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::ioctl("KVM_SET_CPUID2"))?;
    let shown = Features::of(&shown(vcpu)?).lasting();
    Features::of(&cpuid).with(shown).write(&mut cpuid);
    Ok(cpuid)
}

/// What `vcpu` shows.
pub(crate) fn shown(vcpu: &VcpuFd) -> Result<CpuId, Error> {
    vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(Error::ioctl("KVM_GET_CPUID2"))
}

/// What this host's KVM says that it can show any guest of ours, the same for all its vCPUs.
///
/// Nested virtualisation is hidden: a guest that runs guests has state that is not saved. So are
/// asynchronous page faults: which of them are under way only KVM knows, and it does not tell.
fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx &= !VMX;
                entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
            }
            KVM_FEATURES => entry.eax &= !ASYNC_PF,
            0x8000_0001 => entry.ecx &= !SVM,
            // SVM's own leaf.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// `base` as vCPU `index` of `count` sees it: one package, one thread per core.
pub(crate) fn of_vcpu(base: &CpuId, index: u8, count: u8) -> Result<CpuId, Error> {
    let apic_id = u32::from(index);
    let cores = u32::from(count);
    // Bits of an APIC id that number the cores (SDM vol. 3, 9.9.1).
    let width = cores.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = base
        .as_slice()
        .iter()
        .copied()
        .filter(|e| !matches!(e.function, 0xb | 0x1f | 0x8000_0026))
        .collect();
    for entry in &mut entries {
        topology(entry, apic_id, cores, width);
    }
    if leaf(base, 0xb, 0).is_some() {
        let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: apic_id,
            ..Default::default()
        };
        entries.extend([level(0, 0, 1, 1), level(1, width, cores, 2), level(2, 0, 0, 0)]);
    }
    CpuId::from_entries(&entries).map_err(|_| Error::TooManyCpuidEntries(entries.len()))
}

/// Writes the topology into those leaves that tell it beside other things.
fn topology(entry: &mut kvm_cpuid_entry2, apic_id: u32, cores: u32, width: u32) {
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | (1 << width) << 16 | apic_id << 24;
            entry.edx = if cores > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Caches: each level up to 2 belongs to one core, the others to the package.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 < 3 { 0 } else { cores - 1 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << width) - 1) << 26;
        }
        0x8000_0001 => entry.ecx &= !TOPOEXT,
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | width << 12 | (cores - 1),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_sees_its_own_apic_id_and_the_same_package() {
        let entry = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let base = CpuId::from_entries(&[entry(1), entry(0xb), entry(0x8000_0008)]).unwrap();
        for index in 0..3 {
            let cpuid = of_vcpu(&base, index, 3).unwrap();
            let leaf = |function, index| leaf(&cpuid, function, index).unwrap();
            let id = u32::from(index);
            assert_eq!(leaf(1, 0).ebx >> 24, id);
            assert_eq!(leaf(1, 0).ebx >> 16 & 0xff, 4, "three cores need ids 0 to 3");
            assert_eq!(leaf(0xb, 0).edx, id);
            assert_eq!(leaf(0xb, 1).edx, id);
            assert_eq!((leaf(0xb, 1).eax, leaf(0xb, 1).ebx), (2, 3));
            assert_eq!(leaf(0x8000_0008, 0).ecx & 0xff, 2);
        }
    }
}
