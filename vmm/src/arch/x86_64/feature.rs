//! The features that CPUID tells of, and their names.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A register of one CPUID leaf, as a set of features.
pub(crate) struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    /// A name for each bit from 0 on, those of Linux's `/proc/cpuinfo` where it has one; `-` for
    /// none.
    names: &'static str,
}

/// One of the registers that CPUID answers in.
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn of<'a>(&self, entry: &'a mut kvm_cpuid_entry2) -> &'a mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

const fn word(leaf: u32, index: u32, register: Register, names: &'static str) -> Word {
    Word { leaf, index, register, names }
}

/// How many sets there are.
const COUNT: usize = 19;

/// Every set of features that guests see (SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; and
/// Linux's Documentation/virt/kvm/x86/cpuid.rst).
pub(crate) const WORDS: [Word; COUNT] = [
    word(
        0x1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov \
         pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    word(
        0x1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm \
         - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx \
         f16c rdrand hypervisor",
    ),
    word(
        0x7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb \
         intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    word(
        0x7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
         avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker \
         bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        0x7,
        0,
        Register::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl \
         md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig \
         arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    word(
        0x7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc \
         - - - - fred lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam",
    ),
    word(0x7, 1, Register::Ebx, ""),
    word(0x7, 1, Register::Ecx, ""),
    word(
        0x7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti \
         - - - - avx10",
    ),
    word(
        0x7,
        2,
        Register::Edx,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_disable monitor_mitg_no",
    ),
    word(0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clock kvm_nopiodelay kvm_mmu_op kvm_clock2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
         kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range \
         kvm_migration_control - - - - - - kvm_clock_stable",
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp \
         - lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
         ptsc perfctr_llc mwaitx",
    ),
    word(0x8000_0007, 0, Register::Edx, "- - - - - - - - nonstop_tsc"),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
         amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no",
    ),
    word(
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc smm_page_cfg_lock - verw_clear \
         null_sel_clr_base upper_address_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - \
         prefetch_ctl_msr - - - gp_on_user_cpuid epsf - amd_prefetchi - - - eraps - - sbpb \
         ibpb_brtype srso_no srso_user_kernel_no srso_msr_fix",
    ),
    word(0x8000_0021, 0, Register::Ecx, "- tsa_sq_no tsa_l1_no"),
    word(0x8000_0022, 0, Register::Eax, "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze"),
];

/// Other names that people know features by.
const ALIASES: [(&str, &str); 2] = [("sse3", "pni"), ("lzcnt", "abm")];

/// What KVM changes in a guest's own CPUID while it runs, and what tells of topology.
const CHANGING: &str = "osxsave ospke monitor apic ht";

/// The bits of leaf 0x8000_0001, EDX, that repeat those of leaf 1 on AMD's processors.
const REPEATED: u32 = 0x0183_f3ff;

impl Word {
    /// What a profile calls it: `7.0-ebx`.
    pub(crate) fn name(&self) -> String {
        let register = match self.register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        format!("{:x}.{}-{register}", self.leaf, self.index)
    }

    /// The name of the feature at `bit`, or where it is.
    pub(crate) fn feature(&self, bit: u64) -> String {
        let named = usize::try_from(bit).ok().and_then(|bit| self.names.split(' ').nth(bit));
        match named.filter(|name| !matches!(*name, "" | "-")) {
            Some(name) => name.to_owned(),
            None => format!("bit {bit} of {}", self.name()),
        }
    }

    fn of<'a>(&self, entry: &'a mut kvm_cpuid_entry2) -> Option<&'a mut u32> {
        let is_here = entry.function == self.leaf && entry.index == self.index;
        is_here.then(|| self.register.of(entry))
    }
}

/// The name in the table for what people may call a feature; `None` for what is not in it.
pub(crate) fn known(name: &str) -> Option<&'static str> {
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
    let all = WORDS.iter().flat_map(|word| word.names.split(' '));
    all.filter(|known| !matches!(*known, "" | "-")).find(|known| *known == name)
}

/// A set of features: one word for each of [`WORDS`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Features([u32; COUNT]);

impl Features {
    /// Those that `cpuid` tells of.
    pub(crate) fn of(cpuid: &CpuId) -> Self {
        let mut features = Self::default();
        for mut entry in cpuid.as_slice().iter().copied() {
            for (word, bits) in WORDS.iter().zip(&mut features.0) {
                if let Some(register) = word.of(&mut entry) {
                    *bits = *register;
                }
            }
        }
        features
    }

    /// Those of `names`, which are in the table and separated by spaces.
    pub(crate) fn named(names: &str) -> Self {
        let mut features = Self::default();
        for name in names.split(' ') {
            for (word, bits) in WORDS.iter().zip(&mut features.0) {
                if let Some(bit) = word.names.split(' ').position(|known| known == name) {
                    *bits |= 1 << bit;
                }
            }
        }
        features
    }

    /// Without what differs from moment to moment and from vCPU to vCPU.
    pub(crate) fn lasting(self) -> Self {
        self.without(Self::named(CHANGING))
    }

    pub(crate) fn with(self, others: Self) -> Self {
        self.each(others, |own, other| own | other)
    }

    pub(crate) fn without(self, others: Self) -> Self {
        self.each(others, |own, other| own & !other)
    }

    /// Those that are in both.
    pub(crate) fn common(self, others: Self) -> Self {
        self.each(others, |own, other| own & other)
    }

    /// Whether all of `others` are in it.
    pub(crate) fn has(self, others: Self) -> bool {
        others.without(self) == Self::default()
    }

    /// AMD's processors tell some features of leaf 1 a second time: as `host` does it.
    pub(crate) fn repeated_like(mut self, host: Self) -> Self {
        let at = |name| {
            let known = |word: &Word| word.names.split(' ').any(|known| known == name);
            WORDS.iter().position(known).expect("it is in the table")
        };
        let (first, second) = (self.0[at("fpu")], at("syscall"));
        self.0[second] = self.0[second] & !REPEATED | host.0[second] & first & REPEATED;
        self
    }

    /// Their names, in the order of the table.
    pub(crate) fn names(self) -> Vec<String> {
        let names = WORDS.iter().zip(self.0).flat_map(|(word, bits)| {
            (0..32).filter(move |bit| bits >> bit & 1 == 1).map(|bit| word.feature(bit))
        });
        names.collect()
    }

    /// Each set by its name.
    pub(crate) fn words(self) -> impl Iterator<Item = (String, u32)> {
        WORDS.iter().map(Word::name).zip(self.0)
    }

    /// Makes `cpuid` tell of these and no others.
    pub(crate) fn write(self, cpuid: &mut CpuId) {
        for entry in cpuid.as_mut_slice() {
            for (word, bits) in WORDS.iter().zip(self.0) {
                if let Some(register) = word.of(entry) {
                    *register = bits;
                }
            }
        }
    }

    fn each(self, others: Self, join: impl Fn(u32, u32) -> u32) -> Self {
        let mut joined = self;
        for (own, other) in joined.0.iter_mut().zip(others.0) {
            *own = join(*own, other);
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_there_twice_and_no_set_has_more_than_32() {
        let mut all: Vec<_> = WORDS.iter().flat_map(|word| word.names.split(' ')).collect();
        all.retain(|name| !matches!(*name, "" | "-"));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(WORDS.iter().all(|word| word.names.split(' ').count() <= 32));
    }

    /// Bits that the manuals number, one at the end of each longer set: a name that is left out
    /// shifts it.
    #[test]
    fn names_stand_for_the_bits_of_the_manuals() {
        for (name, leaf, bit) in [
            ("pbe", "1.0-edx", 31),
            ("xsave", "1.0-ecx", 26),
            ("hypervisor", "1.0-ecx", 31),
            ("avx2", "7.0-ebx", 5),
            ("avx512f", "7.0-ebx", 16),
            ("avx512vl", "7.0-ebx", 31),
            ("la57", "7.0-ecx", 16),
            ("pks", "7.0-ecx", 31),
            ("amx_tile", "7.0-edx", 24),
            ("spec_ctrl_ssbd", "7.0-edx", 31),
            ("lam", "7.1-eax", 26),
            ("mcdt_no", "7.2-edx", 5),
            ("avx10", "7.1-edx", 19),
            ("xfd", "d.1-eax", 4),
            ("kvm_clock_stable", "40000001.0-eax", 24),
            ("nx", "80000001.0-edx", 20),
            ("3dnow", "80000001.0-edx", 31),
            ("abm", "80000001.0-ecx", 5),
            ("topoext", "80000001.0-ecx", 22),
            ("mwaitx", "80000001.0-ecx", 29),
            ("nonstop_tsc", "80000007.0-edx", 8),
            ("amd_ssbd", "80000008.0-ebx", 24),
            ("btc_no", "80000008.0-ebx", 29),
            ("autoibrs", "80000021.0-eax", 8),
            ("gp_on_user_cpuid", "80000021.0-eax", 17),
            ("sbpb", "80000021.0-eax", 27),
            ("srso_no", "80000021.0-eax", 29),
            ("tsa_l1_no", "80000021.0-ecx", 2),
            ("perfmon_v2", "80000022.0-eax", 0),
        ] {
            let found = WORDS.iter().find(|word| word.name() == leaf).unwrap();
            assert_eq!(found.feature(bit), name);
            assert_eq!(Features::named(name).names(), [name]);
        }
    }

    #[test]
    fn features_survive_being_written_and_read() {
        let mut cpuid = CpuId::from_entries(&[
            kvm_cpuid_entry2 { function: 1, edx: u32::MAX, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, ebx: u32::MAX, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, index: 2, ebx: u32::MAX, ..Default::default() },
        ])
        .unwrap();
        let features = Features::named("sse2 avx2");
        features.write(&mut cpuid);
        assert_eq!(Features::of(&cpuid), features);
        assert_eq!(cpuid.as_slice()[2].ebx, u32::MAX, "no set of features");
    }

    #[test]
    fn sets_are_joined_and_compared() {
        let (both, one) = (Features::named("avx avx2"), Features::named("avx"));
        assert!(both.has(one) && !one.has(both));
        assert_eq!(both.without(one).names(), ["avx2"]);
        assert_eq!(one.with(Features::named("avx2")), both);
        assert_eq!(both.common(Features::named("avx2 bmi1")).names(), ["avx2"]);
        assert_eq!(Features::named("osxsave pni").lasting().names(), ["pni"]);
    }

    #[test]
    fn people_may_use_the_manuals_names_too() {
        assert_eq!(known("lzcnt"), Some("abm"));
        assert_eq!(known("avx2"), Some("avx2"));
        for unknown in ["", "-", "avx3", "avx2 bmi1"] {
            assert_eq!(known(unknown), None);
        }
    }
}
