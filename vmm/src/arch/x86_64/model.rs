//! From a host's CPUID to that of the processors that were asked for.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::extended;
use super::feature::Features;
use crate::config::{CpuBase, CpuModel};
use crate::kvm::Error;

/// x86-64 as the psABI has it, and what every operating system takes for granted with it.
const LEVEL_1: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 \
                       clflush mmx fxsr sse sse2 syscall nx lm";
/// What each further level adds (psABI, table 3.1).
const LEVEL_2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const LEVEL_3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
const LEVEL_4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

/// What KVM itself makes, whatever the processor, and has made for years: a guest of any level has
/// as much of it as the host's kernel gives.
const OF_KVM: &str = "x2apic tsc_deadline_timer hypervisor tsc_adjust kvm_clock kvm_nopiodelay \
                      kvm_clock2 kvm_steal_time kvm_pv_eoi kvm_pv_unhalt kvm_pv_tlb_flush \
                      kvm_pv_send_ipi kvm_pv_sched_yield kvm_clock_stable";

/// Which features are nothing without another; what others need comes first.
const NEEDS: [(&str, &str); 17] = [
    ("xsaveopt", "xsave"),
    ("xsavec", "xsave"),
    ("xgetbv1", "xsave"),
    ("xsaves", "xsave"),
    ("xfd", "xsave"),
    ("pku", "xsave"),
    ("amx_tile", "xsave"),
    ("avx", "xsave"),
    ("fma f16c avx2 vaes vpclmulqdq xop fma4", "avx"),
    ("avx512f avx_vnni avx_ifma avx_vnni_int8 avx_ne_convert", "avx2"),
    ("avx512bw avx512cd avx512dq avx512vl avx512ifma avx512pf avx512er", "avx512f"),
    ("avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect", "avx512f"),
    ("avx512vbmi avx512_vbmi2 avx512_bitalg avx512_vnni", "avx512f"),
    ("avx512_bf16 avx512_fp16", "avx512bw"),
    ("amx_bf16 amx_int8 amx_fp16 amx_complex", "amx_tile"),
    ("kvm_clock_stable", "kvm_clock2"),
    ("tsc_deadline_timer", "apic"),
];

/// A family, model and stepping that are those of no processor that runs KVM, so that no
/// operating system looks for what a certain processor does: family 15, model 107, stepping 1.
const SIGNATURE: u32 = 0x0006_0fb1;
/// Bits of a physical address on the processors of a level: as few as on any that has level 3.
const ADDRESS_BITS: u32 = 39;
const LINEAR_BITS: u32 = 48;
/// Leaf 6, EAX: the local APIC's timer never stops.
const ARAT: u32 = 1 << 2;

/// What a guest sees on a host, and what of it the host lacks.
#[derive(Debug)]
pub(crate) struct Processors {
    /// For [`super::cpuid::of_vcpu`].
    pub(crate) cpuid: CpuId,
    model: CpuModel,
    lacking: Features,
}

impl Processors {
    /// What `model` is on the host whose KVM can show `host`.
    ///
    /// # Errors
    /// The model has a feature that is nothing without another which it has not.
    pub(crate) fn new(host: &CpuId, model: &CpuModel) -> Result<Self, Error> {
        let mut processors =
            Self { cpuid: host.clone(), model: model.clone(), lacking: Features::default() };
        if *model == CpuModel::default() {
            return Ok(processors);
        }
        let has = Features::of(host);
        let wanted = wanted(has, model)?;
        processors.lacking = wanted.without(has);
        let shown = wanted.common(has).repeated_like(has);
        let mut cpuid = host.clone();
        shown.write(&mut cpuid);
        let extra = model.base == CpuBase::Host;
        let mut entries = extended::limited(&cpuid, shown, extra);
        if model.base != CpuBase::Host {
            entries = level(entries, model.base);
        }
        processors.cpuid =
            CpuId::from_entries(&entries).map_err(|_| Error::TooManyCpuidEntries(entries.len()))?;
        Ok(processors)
    }

    /// # Errors
    /// The host lacks something: all of it is told.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let lacking = self.lacking();
        if lacking.is_empty() {
            return Ok(());
        }
        Err(Error::CpuLacks { model: self.model.to_string(), lacking: lacking.join(", ") })
    }

    /// The features that a vCPU of them shows all the same, by name: see [`super::cpuid::host`].
    pub(crate) fn surplus(&self, shown: &CpuId) -> Vec<String> {
        Features::of(shown).lasting().without(Features::of(&self.cpuid)).names()
    }

    /// Warns of what is shown beyond what was asked for.
    pub(crate) fn tell_surplus(&self, shown: &CpuId) {
        let surplus = self.surplus(shown);
        if !surplus.is_empty() {
            tracing::warn!(
                "this host's KVM shows guests more than {}: the guest can only move to hosts that \
                 have {} as well",
                self.model,
                surplus.join(", "),
            );
        }
    }

    /// The features that the host lacks, by name.
    pub(crate) fn lacking(&self) -> Vec<String> {
        self.lacking.names()
    }
}

/// The features that `model` is made of, on a host that `has` some.
fn wanted(has: Features, model: &CpuModel) -> Result<Features, Error> {
    let set = |names: &str| Features::named(names);
    let levels = match model.base {
        CpuBase::Host => has,
        CpuBase::V2 => set(LEVEL_1).with(set(LEVEL_2)),
        CpuBase::V3 => set(LEVEL_1).with(set(LEVEL_2)).with(set(LEVEL_3)),
        CpuBase::V4 => set(LEVEL_1).with(set(LEVEL_2)).with(set(LEVEL_3)).with(set(LEVEL_4)),
    };
    let all = |features: &[crate::config::CpuFeature]| {
        features.iter().fold(Features::default(), |all, feature| all.with(set(feature.name())))
    };
    let added = all(&model.add);
    let mut wanted = levels.with(set(OF_KVM).common(has)).with(added).without(all(&model.remove));
    for (features, needed) in NEEDS {
        if wanted.has(set(needed)) {
            continue;
        }
        if let Some(feature) = wanted.common(set(features)).common(added).names().pop() {
            return Err(Error::CpuNeeds { feature, needed });
        }
        wanted = wanted.without(set(features));
    }
    Ok(wanted)
}

/// The leaves that processors of a level have: nothing in them tells hosts apart but the vendor
/// and the caches.
fn level(entries: Vec<kvm_cpuid_entry2>, base: CpuBase) -> Vec<kvm_cpuid_entry2> {
    let brand = format!("{:48}", format!("uvmm {base} processor")).into_bytes();
    let is_used = |entry: &kvm_cpuid_entry2| match entry.function {
        // Its further leaves are features that no level has, unless they were added.
        7 => entry.index == 0 || registers(entry) != [0; 4],
        0x8000_0021 => [entry.eax, entry.ecx] != [0; 2],
        0x8000_0022 => entry.eax != 0,
        0 | 1 | 4 | 6 | 0xb | 0xd | 0x4000_0000 | 0x4000_0001 => true,
        0x8000_0000..=0x8000_0008 => true,
        _ => false,
    };
    let mut entries: Vec<_> = entries.into_iter().filter(is_used).collect();
    let highest = |range: std::ops::Range<u32>| {
        let leaves = entries.iter().map(|entry| entry.function);
        leaves.filter(|leaf| range.contains(leaf)).max().unwrap_or(range.start)
    };
    let (basic, extended) = (highest(0..0x4000_0000), highest(0x8000_0000..0x8000_0100));
    let leaf_7 = entries.iter().filter(|entry| entry.function == 7).map(|entry| entry.index).max();
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = basic,
            1 => (entry.eax, entry.ebx) = (SIGNATURE, entry.ebx & 0xff00),
            6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & ARAT, 0, 0, 0),
            7 if entry.index == 0 => entry.eax = leaf_7.unwrap_or(0),
            0x8000_0000 => entry.eax = extended,
            // A repetition on AMD's, zero on Intel's.
            0x8000_0001 => {
                (entry.eax, entry.ebx) = (if entry.eax == 0 { 0 } else { SIGNATURE }, 0);
            }
            0x8000_0002..=0x8000_0004 => {
                let part = &brand[16 * (entry.function - 0x8000_0002) as usize..][..16];
                let word = |at: usize| {
                    u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]])
                };
                (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                    (word(0), word(4), word(8), word(12));
            }
            0x8000_0007 => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
            0x8000_0021 => (entry.ebx, entry.edx) = (0, 0),
            0x8000_0008 => {
                let bits = ADDRESS_BITS.min(entry.eax & 0xff);
                (entry.eax, entry.ecx, entry.edx) = (LINEAR_BITS << 8 | bits, 0, 0);
            }
            _ => {}
        }
    }
    entries
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::cpuid::leaf;
    use super::*;

    /// What CPUID answers to `function` and `index`.
    pub(in super::super) fn entry(
        function: u32,
        index: u32,
        [eax, ebx, ecx, edx]: [u32; 4],
    ) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host that shows `features` besides level 1, and parts of extended state as AMD's
    /// processors with AVX-512 and protection keys have them.
    pub(in super::super) fn host(features: &str) -> CpuId {
        let has = |name| features.split(' ').any(|feature| feature == name);
        let mut parts = vec![(2, 256, 576)];
        if has("avx512f") {
            parts.extend([(5, 64, 832), (6, 512, 896), (7, 1024, 1408)]);
        }
        if has("pku") {
            parts.push((9, 8, 2432));
        }
        let mask = parts.iter().fold(0b11, |mask, (part, _, _)| mask | 1 << part);
        let mut leaves = vec![
            entry(0, 0, [0x20, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            entry(1, 0, [0x00a0_0f11, 0x0102_0800, 0, 0]),
            entry(6, 0, [0x77, 1, 1, 1]),
            entry(7, 0, [2, 0, 0, 0]),
            entry(7, 1, [0; 4]),
            entry(0xa, 0, [0x0730_0802, 0, 0, 0]),
            entry(0xb, 0, [0; 4]),
            entry(0xd, 0, [mask, 576, if has("pku") { 2440 } else { 832 }, 0]),
            entry(0xd, 1, [0, 0, 0x1000, 0]),
            entry(0xd, 12, [24, 0, 1, 0]),
            entry(0x4000_0001, 0, [0; 4]),
            entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
            entry(0x8000_0001, 0, [0x00a0_0f11, 0, 0, 0x0183_f3ff]),
            entry(0x8000_0002, 0, [0x2044_4d41; 4]),
            entry(0x8000_0007, 0, [0; 4]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x7001, 0]),
            entry(0x8000_0021, 0, [4, 0x0a00, 0, 0]),
        ];
        leaves.extend(parts.into_iter().map(|(part, size, at)| entry(0xd, part, [size, at, 0, 0])));
        let mut cpuid = CpuId::from_entries(&leaves).unwrap();
        let all = Features::named(LEVEL_1).with(Features::named(features));
        all.repeated_like(Features::of(&cpuid)).write(&mut cpuid);
        cpuid
    }

    /// What a host of AVX-512 shows.
    pub(in super::super) fn large() -> CpuId {
        host(&format!(
            "{LEVEL_2} {LEVEL_3} {LEVEL_4} {OF_KVM} pku aes nonstop_tsc amd_ibpb sha512 \
               lfence_rdtsc"
        ))
    }

    /// What a host of AVX2 shows.
    pub(in super::super) fn small() -> CpuId {
        host(&format!("{LEVEL_2} {LEVEL_3} {OF_KVM}"))
    }

    fn made(host: &CpuId, text: &str) -> Processors {
        Processors::new(host, &toml::from_str(text).unwrap()).unwrap()
    }

    #[test]
    fn every_name_of_a_level_is_known() {
        let needs = NEEDS.map(|(features, needed)| format!("{features} {needed}")).join(" ");
        for name in [LEVEL_1, LEVEL_2, LEVEL_3, LEVEL_4, OF_KVM, &needs].join(" ").split(' ') {
            assert!(super::super::feature::known(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_level_is_the_same_on_different_hosts() {
        for level in ["base = 'x86-64-v2'", "base = 'x86-64-v3'"] {
            let (large, small) = (made(&large(), level), made(&small(), level));
            large.check().unwrap();
            small.check().unwrap();
            assert_eq!(large.cpuid.as_slice(), small.cpuid.as_slice(), "{level}");
        }
    }

    #[test]
    fn a_level_has_its_features_and_those_of_kvm_and_no_others() {
        let v3 = made(&large(), "base = 'x86-64-v3'");
        let all = [LEVEL_1, LEVEL_2, LEVEL_3, OF_KVM].map(Features::named);
        let all = all.into_iter().fold(Features::default(), Features::with);
        assert_eq!(Features::of(&v3.cpuid), all.repeated_like(Features::of(&large())));
        assert!(made(&large(), "base = 'x86-64-v2'").cpuid.as_slice().iter().all(|leaf| {
            // No XSAVE, no extended state.
            leaf.function != 0xd
        }));
    }

    #[test]
    fn what_tells_hosts_apart_is_not_in_a_level() {
        let v3 = made(&large(), "base = 'x86-64-v3'").cpuid;
        assert_eq!(leaf(&v3, 0, 0).unwrap().eax, 0xd, "the last leaf that there is");
        assert_eq!(leaf(&v3, 1, 0).unwrap().eax, SIGNATURE);
        assert_eq!(leaf(&v3, 6, 0).map(|leaf| registers(&leaf)), Some([ARAT, 0, 0, 0]));
        assert_eq!((leaf(&v3, 7, 0).unwrap().eax, leaf(&v3, 7, 1)), (0, None));
        assert_eq!((leaf(&v3, 0xa, 0), leaf(&v3, 0x8000_0021, 0)), (None, None));
        assert_eq!(leaf(&v3, 0x8000_0000, 0).unwrap().eax, 0x8000_0008);
        assert_eq!(leaf(&v3, 0x8000_0008, 0).unwrap().eax, 0x3027, "48 and 39 bits");
        assert_eq!(leaf(&v3, 0x8000_0002, 0).unwrap().eax.to_le_bytes(), *b"uvmm");
    }

    #[test]
    fn extended_state_is_that_of_the_features() {
        let v3 = made(&large(), "base = 'x86-64-v3'").cpuid;
        assert_eq!(leaf(&v3, 0xd, 0).map(|leaf| registers(&leaf)), Some([0b111, 576, 832, 0]));
        assert!(leaf(&v3, 0xd, 2).is_some() && leaf(&v3, 0xd, 5).is_none());
        assert_eq!((leaf(&v3, 0xd, 1).unwrap().ecx, leaf(&v3, 0xd, 12)), (0, None));
        let v4 = made(&large(), "base = 'x86-64-v4'").cpuid;
        assert_eq!(leaf(&v4, 0xd, 0).map(|leaf| registers(&leaf)), Some([0xe7, 576, 2432, 0]));
        let with_keys = made(&large(), "base = 'x86-64-v3'\nadd = ['pku']").cpuid;
        assert_eq!(leaf(&with_keys, 0xd, 0).unwrap().ecx, 2440);
    }

    #[test]
    fn a_host_is_refused_with_all_that_it_lacks() {
        let error = made(&small(), "base = 'x86-64-v4'\nadd = ['aes']").check().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("x86-64-v4+aes"), "{text}");
        let lacking = "lacks aes, avx512f, avx512dq, avx512cd, avx512bw, avx512vl:";
        assert!(text.contains(lacking), "{text}");
    }

    #[test]
    fn features_are_added_and_removed_with_what_is_nothing_without_them() {
        let more = made(&large(), "base = 'x86-64-v2'\nadd = ['aes', 'sha512']");
        more.check().unwrap();
        assert!(Features::of(&more.cpuid).has(Features::named("aes sha512 popcnt")));
        assert_eq!(leaf(&more.cpuid, 7, 0).unwrap().eax, 1, "leaf 7 has a second part again");
        let late = made(&large(), "base = 'x86-64-v2'\nadd = ['lfence_rdtsc']").cpuid;
        assert_eq!(leaf(&late, 0x8000_0021, 0).map(|leaf| registers(&leaf)), Some([4, 0, 0, 0]));
        assert_eq!(leaf(&late, 0x8000_0000, 0).unwrap().eax, 0x8000_0021);
        let less = Features::of(&made(&large(), "base = 'host'\nremove = ['avx']").cpuid);
        assert_eq!(less.common(Features::named("avx avx2 fma avx512f avx512vl")).names().len(), 0);
        assert!(less.has(Features::named("aes xsave pku nonstop_tsc")));
        let model = toml::from_str("base = 'x86-64-v2'\nadd = ['avx2']").unwrap();
        let error = Processors::new(&large(), &model).unwrap_err();
        assert!(matches!(error, Error::CpuNeeds { needed: "avx", .. }), "{error}");
    }

    #[test]
    fn the_host_as_it_is_stays_as_it_is() {
        let same = made(&large(), "base = 'host'");
        assert_eq!(same.cpuid.as_slice(), large().as_slice());
    }

    #[test]
    fn what_a_kvm_shows_unasked_is_noticed() {
        let v2 = made(&large(), "base = 'x86-64-v2'");
        assert_eq!(v2.surplus(&v2.cpuid), [""; 0]);
        assert!(v2.surplus(&large()).contains(&"avx2".to_owned()));
    }
}
