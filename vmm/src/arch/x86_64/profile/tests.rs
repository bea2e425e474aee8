use kvm_bindings::CpuId;
use migration::compat::{Mismatch, agree_in_terms};

use super::super::model::{Processors, tests::large, tests::small};
use super::*;
use crate::config::{CpuBase, CpuModel};

/// What a host offers, and what a guest has that was given all of it.
fn platform(cpuid: CpuId) -> Platform {
    Platform {
        cpuid,
        xsave_bytes: 4096,
        tsc_khz: 2_400_000,
        msrs: BTreeSet::from([0x10, 0x174, 0xc000_0080]),
        promises: promised(0b1010_1011),
        pci_memory: Some(16 << 30..32 << 30),
    }
}

/// What a processor tells that has this in `IA32_ARCH_CAPABILITIES`.
fn promised(value: u64) -> Promises {
    Promises::of_guest(&BTreeMap::from([(0x10a, value)]))
}

/// A guest of that level, started on a host of AVX-512.
fn guest_of(base: CpuBase) -> Platform {
    platform(Processors::new(&large(), &CpuModel::from(base)).unwrap().cpuid)
}

fn mismatches(guest: &Platform, host: &Platform) -> Vec<Mismatch> {
    agree_in_terms(&guest.wanted(), &host.profile(), &ProcessorTerms).err().unwrap_or_default()
}

#[test]
fn a_guest_of_a_level_fits_every_host_that_has_it() {
    for base in [CpuBase::V2, CpuBase::V3] {
        assert_eq!(mismatches(&guest_of(base), &platform(small())), []);
        assert_eq!(mismatches(&guest_of(base), &platform(large())), []);
    }
}

#[test]
fn features_that_a_host_lacks_are_told_by_name() {
    let told = mismatches(&guest_of(CpuBase::V4), &platform(small()));
    let paths: Vec<_> = told.iter().map(|m| m.path.as_str()).collect();
    assert_eq!(paths, ["cpu/xsave", "cpu/features/7.0-ebx"]);
    assert!(told[0].wanted.contains("avx512-masks of 64 bytes at 832"), "{}", told[0]);
    assert_eq!(told[1].wanted, "avx512f, avx512dq, avx512cd, avx512bw, avx512vl");
    assert!(told[1].remedy.contains("--cpu"), "{}", told[1]);
    let told = mismatches(&platform(large()), &platform(small()));
    let wanted: Vec<_> = told.iter().map(|m| m.wanted.as_str()).collect();
    for name in ["aes", "pku", "nonstop_tsc", "amd_ibpb", "sha512"] {
        assert!(wanted.iter().any(|wanted| wanted.split(", ").any(|w| w == name)), "{wanted:?}");
    }
}

#[test]
fn everything_that_differs_is_told_at_once_with_what_helps() {
    let guest = guest_of(CpuBase::V4);
    let mut host = platform(small());
    host.xsave_bytes = 2048;
    host.tsc_khz = 3_000_000;
    host.msrs = BTreeSet::from([0x10, 0xc000_0080]);
    host.promises = promised(0b1010_1010);
    host.pci_memory = None;
    for entry in host.cpuid.as_mut_slice() {
        match entry.function {
            0 => entry.ebx = 0x756e_6547,
            0x8000_0008 => entry.eax = 0x3024,
            _ => {}
        }
    }
    let told = mismatches(&guest, &host);
    let found = |path: &str| told.iter().find(|m| m.path == path).unwrap().to_string();
    assert!(found("cpu/vendor").contains("same maker"));
    assert!(found("cpu/tsc-khz").contains("wanted 2400000, found 3000000: this host cannot scale"));
    assert!(found("cpu/msrs").contains("wanted 0x174, found a host without it: use a kernel"));
    assert!(found("cpu/xsave-bytes").contains("wanted 4096, found 2048"));
    assert!(found("cpu/address-bits").contains("wanted 39, found 36: choose a host"));
    assert!(found("pci/memory-64").contains("found \"none\": choose a host"));
    assert!(found("cpu/features/7.0-ebx").contains("avx512f"));
    assert!(found("cpu/arch-capabilities").contains("wanted rdcl_no, found a host without it"));
    assert_eq!(told.len(), 9, "{told:#?}");
}

#[test]
fn counters_and_what_amd_tells_last_are_compared_as_well() {
    let guest = platform(large());
    let mut host = platform(large());
    for entry in host.cpuid.as_mut_slice() {
        match entry.function {
            0xa => (entry.eax, entry.ebx) = (0x0730_0402, 0x20),
            0x8000_0021 => entry.eax = 0,
            _ => {}
        }
    }
    let told = mismatches(&guest, &host);
    let found: Vec<_> = told.iter().map(|m| (m.path.as_str(), m.wanted.as_str())).collect();
    let counters = ("cpu/pmu/counters", "8");
    let events = ("cpu/pmu/events", "branches");
    let features = ("cpu/features/80000021.0-eax", "lfence_rdtsc");
    assert_eq!(found, [counters, events, features]);
    assert!(told.iter().all(|m| m.remedy.contains("--cpu")), "{told:#?}");
}

#[test]
fn a_build_that_does_not_know_of_a_thing_takes_a_guest_that_has_nothing_of_it() {
    let new = |path: &str| ["7.2-", "80000021.", "/pmu/"].iter().any(|part| path.contains(part));
    let host = platform(large()).profile();
    assert!(host.items().iter().any(|item| new(&item.path)));
    let known = host.items().iter().filter(|item| !new(&item.path)).cloned();
    let older = known.fold(Profile::new(), Profile::with_item);
    agree_in_terms(&guest_of(CpuBase::V4).wanted(), &older, &ProcessorTerms).unwrap();
    agree_in_terms(&platform(large()).wanted(), &older, &ProcessorTerms).unwrap_err();
}

#[test]
fn a_part_of_extended_state_at_another_place_is_told() {
    let guest = guest_of(CpuBase::V4);
    let mut host = platform(large());
    let parts = host.cpuid.as_mut_slice().iter_mut();
    parts.filter(|leaf| (leaf.function, leaf.index) == (0xd, 5)).for_each(|leaf| leaf.ebx = 1088);
    let told = mismatches(&guest, &host);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].path, "cpu/xsave");
    assert_eq!(told[0].wanted, "avx512-masks of 64 bytes at 832");
}

#[test]
fn a_host_with_more_is_no_mismatch() {
    let mut host = platform(large());
    host.xsave_bytes = 11008;
    host.msrs.insert(0x1c4);
    assert_eq!(mismatches(&guest_of(CpuBase::V3), &host), []);
}

#[test]
fn what_changes_while_a_guest_runs_is_not_compared() {
    let mut guest = guest_of(CpuBase::V3);
    let seen = Features::of(&guest.cpuid).with(Features::named("osxsave ospke ht monitor"));
    seen.write(&mut guest.cpuid);
    assert_eq!(mismatches(&guest, &platform(small())), []);
}

#[test]
fn a_tsc_fits_if_it_is_near_or_if_the_host_can_scale() {
    for (scales, guest, gives) in [
        (false, None, 3_000_000),
        (false, Some(2_400_000), 3_000_000),
        (false, Some(3_000_700), 3_000_700),
        (false, Some(3_000_800), 3_000_000),
        (true, Some(2_400_000), 2_400_000),
    ] {
        assert_eq!(tsc_khz(3_000_000, scales, guest), gives, "{scales} {guest:?}");
    }
}
