//! States of processors, interrupt controllers and clocks that nobody saved.

use kvm_bindings::CpuId;
use migration::compat::{Profile, agree_in_terms};

use super::clock::ClockV1;
use super::irqchip::IrqchipV1;
use super::profile::{Platform, ProcessorTerms};
use super::vcpu::VcpuV1;
use super::{cpuid, layout};
use crate::testing::{decoded, encoded};

/// What this host's time-stamp counter runs at.
const HOST_KHZ: u32 = 2_000_000;

/// Reads `bytes` as each of them.
pub(crate) fn read(bytes: &[u8]) {
    if let Some(vcpu) = decoded::<VcpuV1>(bytes) {
        read_vcpu(vcpu);
    }
    decoded::<IrqchipV1>(bytes);
    if let Some(clock) = decoded::<ClockV1>(bytes) {
        let here = clock.at(9_000_000_000, 7);
        let _both = (clock.shift(&here), here.shift(&clock));
    }
}

/// All that is done with it besides giving it to KVM.
fn read_vcpu(vcpu: VcpuV1) {
    if let Ok(cpuid) = vcpu.cpuid() {
        let seen = vcpu.seen(&cpuid).expect("a host that shows the same lacks nothing");
        let memory = layout::pci_memory_64(1 << 30, cpuid::address_bits(&cpuid));
        let platform = Platform::known(&seen, &vcpu.msrs(), memory);
        let (wanted, profile) = (platform.wanted(), platform.profile());
        agree_in_terms(&wanted, &profile, &ProcessorTerms).expect("a guest is like itself");
        let elsewhere = agree_in_terms(&profile, &Profile::new(), &ProcessorTerms);
        elsewhere.expect_err("a host that tells nothing of itself fits nobody");
    }
    let none = CpuId::from_entries(&[]).expect("none are not too many");
    let _lacks_most = vcpu.seen(&none);
    vcpu.unscaled_tsc_offset(HOST_KHZ);
    decoded::<VcpuV1>(&encoded(&vcpu.with(&[(0x10, 1)]))).expect("it was read before");
}
