//! What of this host's processors a guest depends on: compared before anything moves.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use migration::compat::{Profile, Rule};

use super::{cpuid, vcpu};
use crate::kvm::{Error, Vm};

/// The registers of CPUID that are sets of features: leaf, index, and which of EAX, EBX, ECX, EDX.
const FEATURES: [(u32, u32, [bool; 4]); 8] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, false, false]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0008, 0, [false, true, false, false]),
];

/// What a machine on this host depends on.
///
/// `tsc_khz` is the frequency that its vCPUs start with. A destination names the one that the
/// guest knows, as `guest_tsc_khz`: it reports that very frequency if it is its own, as far as KVM
/// tells them apart, or if it can scale to it.
pub(crate) fn of_machine(
    vm: &Vm,
    tsc_khz: u32,
    guest_tsc_khz: Option<u64>,
) -> Result<Profile, Error> {
    let cpuid = cpuid::host(vm.kvm())?;
    let own = u64::from(tsc_khz);
    let scales = vm.kvm().check_extension(Cap::TscControl);
    let tsc_khz = guest_tsc_khz.filter(|&khz| scales || vcpu::is_same_tsc(own, khz)).unwrap_or(own);
    let mut profile = Profile::new()
        .with("cpu/architecture", Rule::Eq, "x86-64")
        .with("cpu/vendor", Rule::Eq, vendor(&cpuid))
        .with("cpu/xsave-bytes", Rule::Eq, vcpu::xsave_bytes(vm.kvm()) as u64)
        .with(TSC_KHZ, Rule::Eq, tsc_khz)
        .with("pci/memory-64", Rule::Eq, pci_memory(vm)?);
    for (function, index, registers) in FEATURES {
        let leaf = leaf(&cpuid, function, index);
        let values = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
        let features = values.into_iter().zip(registers).filter(|(_, is_set)| *is_set);
        let bits: Vec<_> = features.map(|(value, _)| u64::from(value)).collect();
        profile = profile.with(format!("cpu/cpuid-{function:x}.{index}"), Rule::Subset, bits);
    }
    Ok(profile)
}

/// Where 64-bit base address registers can be, which depends on the host's processors.
fn pci_memory(vm: &Vm) -> Result<String, Error> {
    Ok(vm
        .pci_memory_64()?
        .map_or("none".to_owned(), |range| format!("{:#x}..{:#x}", range.start, range.end)))
}

/// The path of the TSC's frequency in a profile.
pub(crate) const TSC_KHZ: &str = "cpu/tsc-khz";

fn vendor(cpuid: &CpuId) -> String {
    let leaf = leaf(cpuid, 0, 0);
    let text: Vec<u8> =
        [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    String::from_utf8_lossy(&text).into_owned()
}

/// A leaf; one that the host lacks reads as zeros.
fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut entries = cpuid.as_slice().iter();
    entries.find(|e| e.function == function && e.index == index).copied().unwrap_or_default()
}
