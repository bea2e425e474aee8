//! States of processors, interrupt controllers and clocks that nobody saved.
//!
//! What KVM makes of a state is KVM's own to check; here it is what uvmm reads of it before.

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use migration::state::Saved;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use serde::Serialize;

use super::clock::ClockV1;
use super::irqchip::IrqchipV1;
use super::vcpu::VcpuV1;

/// A structure of KVM's, all zero, as it is saved.
fn zeros<T>() -> Vec<u8> {
    vec![0; size_of::<T>()]
}

fn encoded(state: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(state).expect("plain data encodes")
}

/// The fields of a vCPU's state in their order, with a few leaves and registers.
fn vcpu() -> Vec<u8> {
    let leaf = |function: u32, eax: u32| {
        let mut leaf = zeros::<kvm_cpuid_entry2>();
        leaf[..4].copy_from_slice(&function.to_le_bytes());
        leaf[12..16].copy_from_slice(&eax.to_le_bytes());
        leaf
    };
    let registers = [zeros::<kvm_mp_state>(), zeros::<kvm_regs>(), zeros::<kvm_sregs>()];
    let extended = (vec![0_u32; 1024], zeros::<kvm_xcrs>(), zeros::<kvm_debugregs>());
    let rest = (zeros::<kvm_lapic_state>(), 2_000_000_u32, Some(5_u64));
    let cpuid = vec![leaf(0, 0x0d), leaf(1, 0xa20f12), leaf(0x8000_0000, 0x8000_001f)];
    let msrs = vec![(0x10_u32, 77_u64), (0xc000_0080, 0xd01)];
    encoded(&(registers, extended, rest, cpuid, msrs, zeros::<kvm_vcpu_events>()))
}

fn irqchip() -> Vec<u8> {
    let chip = zeros::<kvm_irqchip>;
    encoded(&(zeros::<kvm_pit_state2>(), chip(), chip(), chip()))
}

fn clock() -> Vec<u8> {
    encoded(&(9_000_000_000_u64, Some((7_u64, 2_000_000_u32))))
}

/// Reads `bytes` as a `T`; what can be read must read the same when it is written again.
fn decoded<T: Saved>(bytes: &[u8]) -> Option<T> {
    let state = T::decode(T::VERSION, bytes).ok()?;
    let again = encoded(&state);
    let same = T::decode(T::VERSION, &again).map(|state| encoded(&state));
    assert_eq!(same.ok(), Some(again));
    Some(state)
}

fn try_all(bytes: &[u8]) {
    if let Some(vcpu) = decoded::<VcpuV1>(bytes) {
        let host = CpuId::from_entries(&[]).expect("none are not too many");
        if let Ok(seen) = vcpu.seen(&host) {
            super::vcpu::guest_xsave_bytes(&seen.cpuid);
        }
        vcpu.unscaled_tsc_offset(2_000_000);
        decoded::<VcpuV1>(&encoded(&vcpu.with(&[(0x10, 1)])));
    }
    decoded::<IrqchipV1>(bytes);
    if let Some(clock) = decoded::<ClockV1>(bytes) {
        let other = decoded::<ClockV1>(&self::clock()).expect("it is valid");
        let _both = (clock.shift(&other), other.shift(&clock));
    }
}

#[test]
fn what_is_saved_can_be_read() {
    assert!(decoded::<VcpuV1>(&vcpu()).is_some());
    assert!(decoded::<IrqchipV1>(&irqchip()).is_some());
    assert!(decoded::<ClockV1>(&clock()).is_some());
    for whole in [vcpu(), irqchip(), clock()] {
        try_all(&whole);
        (0..whole.len()).for_each(|len| {
            assert!(decoded::<VcpuV1>(&whole[..len]).is_none(), "cut after {len}");
            assert!(decoded::<IrqchipV1>(&whole[..len]).is_none(), "cut after {len}");
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_state_that_a_peer_makes_up_breaks_anything(
        which in 0..3_usize,
        changes in vec((any::<Index>(), prop_oneof![any::<u8>(), Just(0x80), Just(0xff)]), 0..9),
        cut in proptest::option::of(any::<Index>()),
        more in vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = [vcpu, irqchip, clock][which]();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        try_all(&bytes);
        bytes.extend(more);
        try_all(&bytes);
    }
}
