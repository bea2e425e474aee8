//! Numbers in CPUID's answers: how many counters there are, which version of something it is.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use migration::compat::{Profile, Rule, Value};

use super::cpuid::leaf;
use super::feature::{Features, Register};

/// A field of a register, and how to compare it.
struct Field {
    path: &'static str,
    leaf: u32,
    index: u32,
    register: Register,
    /// Its lowest bit and its width.
    at: (u32, u32),
    fits: Fits,
    /// The feature without which it means nothing.
    of: Option<&'static str>,
}

/// Where a guest fits that knows such a field; none where the field is zero fits everywhere.
#[derive(Clone, Copy)]
enum Fits {
    /// A number, where it is as large or larger: KVM can give less than there is.
    More,
    /// A number, where it is the same.
    Same,
    /// A set of bits, where each of them is set.
    Bits,
}

const fn field(
    path: &'static str,
    (leaf, index): (u32, u32),
    register: Register,
    at: (u32, u32),
    fits: Fits,
    of: Option<&'static str>,
) -> Field {
    Field { path, leaf, index, register, at, fits, of }
}

const PT: Option<&str> = Some("intel_pt");
const AMX: Option<&str> = Some("amx_tile");
const AVX10: Option<&str> = Some("avx10");

/// SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.
const FIELDS: [Field; 20] = [
    field("cpu/pmu/version", (0xa, 0), Register::Eax, (0, 8), Fits::More, None),
    field("cpu/pmu/counters", (0xa, 0), Register::Eax, (8, 8), Fits::More, None),
    field("cpu/pmu/counter-bits", (0xa, 0), Register::Eax, (16, 8), Fits::More, None),
    field("cpu/pmu/fixed-counters", (0xa, 0), Register::Edx, (0, 5), Fits::More, None),
    field("cpu/pmu/fixed-counter-bits", (0xa, 0), Register::Edx, (5, 8), Fits::More, None),
    field("cpu/pmu/fixed-counter-set", (0xa, 0), Register::Ecx, (0, 32), Fits::Bits, None),
    field("cpu/trace/abilities", (0x14, 0), Register::Ebx, (0, 32), Fits::Bits, PT),
    field("cpu/trace/outputs", (0x14, 0), Register::Ecx, (0, 31), Fits::Bits, PT),
    field("cpu/trace/linear", (0x14, 0), Register::Ecx, (31, 1), Fits::Same, PT),
    field("cpu/trace/ranges", (0x14, 1), Register::Eax, (0, 3), Fits::More, PT),
    field("cpu/trace/periods", (0x14, 1), Register::Eax, (16, 16), Fits::Bits, PT),
    field("cpu/trace/thresholds", (0x14, 1), Register::Ebx, (0, 32), Fits::Bits, PT),
    field("cpu/amx/palette", (0x1d, 1), Register::Eax, (0, 32), Fits::Same, AMX),
    field("cpu/amx/tiles", (0x1d, 1), Register::Ebx, (0, 32), Fits::Same, AMX),
    field("cpu/amx/rows", (0x1d, 1), Register::Ecx, (0, 16), Fits::Same, AMX),
    field("cpu/amx/products", (0x1e, 0), Register::Ebx, (0, 24), Fits::Same, AMX),
    field("cpu/avx10/version", (0x24, 0), Register::Ebx, (0, 8), Fits::More, AVX10),
    field("cpu/avx10/lengths", (0x24, 0), Register::Ebx, (16, 3), Fits::Bits, AVX10),
    field("cpu/return-predictor", (RETURNS, 0), Register::Ebx, (16, 8), Fits::Same, Some("eraps")),
    field(
        "cpu/pmu/amd-counters",
        (AMD_PMU, 0),
        Register::Ebx,
        (0, 4),
        Fits::More,
        Some("perfmon_v2"),
    ),
];
const RETURNS: u32 = 0x8000_0021;
const AMD_PMU: u32 = 0x8000_0022;

/// The events that a processor with performance counters can count by their architectural numbers:
/// leaf 0xa tells in EBX which it cannot, and in EAX of how many that is true (SDM vol. 3, 21.2.1).
const EVENTS: &str = "cpu/pmu/events";
const EVENT_NAMES: [&str; 8] = [
    "core-cycles",
    "instructions",
    "reference-cycles",
    "cache-references",
    "cache-misses",
    "branches",
    "branch-misses",
    "topdown-slots",
];

impl Field {
    fn of(&self, cpuid: &CpuId) -> u64 {
        if self.of.is_some_and(|feature| !Features::of(cpuid).has(Features::named(feature))) {
            return 0;
        }
        let mut answer = leaf(cpuid, self.leaf, self.index).unwrap_or_default();
        let (lowest, width) = self.at;
        u64::from(*self.register.of(&mut answer)) >> lowest & ((1 << width) - 1)
    }

    fn add_to(&self, profile: Profile, cpuid: &CpuId) -> Profile {
        let (value, path) = (self.of(cpuid), self.path);
        let (rule, value) = match self.fits {
            Fits::More => (Rule::AtLeast, Value::Number(value)),
            Fits::Bits => (Rule::Subset, Value::Bits(vec![value])),
            Fits::Same => {
                let used = Some(value).filter(|value| *value != 0);
                (Rule::Subset, Value::Numbers(used.into_iter().collect()))
            }
        };
        profile.with(path, rule, value)
    }
}

/// Adds what `cpuid` tells to what is compared.
pub(super) fn add_to(profile: Profile, cpuid: &CpuId) -> Profile {
    let profile = FIELDS.iter().fold(profile, |profile, field| field.add_to(profile, cpuid));
    let kvm_cpuid_entry2 { eax, ebx, .. } = leaf(cpuid, 0xa, 0).unwrap_or_default();
    let told = 1_u64.checked_shl(eax >> 24).map_or(u64::MAX, |end| end - 1);
    profile.with(EVENTS, Rule::Subset, vec![u64::from(!ebx) & told])
}

/// Whether a profile tells of such a thing at `path`.
pub(super) fn is_at(path: &str) -> bool {
    path == EVENTS || FIELDS.iter().any(|field| field.path == path)
}

/// What people call the bit or the number `member` at `path`.
pub(super) fn name(path: &str, member: u64) -> String {
    let event = usize::try_from(member).ok().and_then(|at| EVENT_NAMES.get(at));
    let event = event.filter(|_| path == EVENTS);
    let is_set =
        |field: &Field| path == EVENTS || field.path == path && matches!(field.fits, Fits::Bits);
    match event {
        Some(name) => (*name).to_owned(),
        None if FIELDS.iter().any(is_set) => format!("bit {member}"),
        None => member.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use migration::compat::agree;

    use super::super::model::tests::entry;
    use super::*;

    type Leaf = (u32, u32, [u32; 4]);

    const ALL: u32 = u32::MAX;

    fn processor(leaves: &[Leaf]) -> CpuId {
        let entries = leaves.iter().map(|&(function, index, to)| entry(function, index, to));
        CpuId::from_entries(&entries.collect::<Vec<_>>()).unwrap()
    }

    /// The paths at which a guest of one processor does not fit the other.
    fn against(guest: &[Leaf], host: &[Leaf]) -> Vec<String> {
        let [guest, host] = [guest, host].map(|leaves| add_to(Profile::new(), &processor(leaves)));
        let mismatches = agree(&guest, &host).err().unwrap_or_default();
        assert!(mismatches.iter().all(|mismatch| is_at(&mismatch.path)), "{mismatches:?}");
        mismatches.into_iter().map(|mismatch| mismatch.path).collect()
    }

    /// Version 2, eight counters of 48 bits, three fixed ones; of seven events the last is missing.
    const PMU: Leaf = (0xa, 0, [0x0730_0802, 0x40, 0, 0x603]);

    #[test]
    fn performance_counters_that_a_guest_knows_of_are_there_where_it_goes() {
        assert_eq!(against(&[PMU], &[PMU]), [""; 0]);
        let more = (0xa, 0, [0x0830_0a03, 0, 0xf, 0x604]);
        assert_eq!(against(&[PMU], &[more]), [""; 0]);
        let told = ["version", "counters", "fixed-counters", "fixed-counter-set", "events"];
        assert_eq!(against(&[more], &[PMU]), told.map(|name| format!("cpu/pmu/{name}")));
        let all = ["version", "counters", "counter-bits", "fixed-counters", "fixed-counter-bits"];
        let all = all.into_iter().chain(["events"]).map(|name| format!("cpu/pmu/{name}"));
        assert_eq!(against(&[PMU], &[]), all.collect::<Vec<_>>());
        assert_eq!(against(&[], &[PMU]), [""; 0], "a guest without any fits everywhere");
    }

    #[test]
    fn an_event_is_there_if_it_is_told_of_and_not_denied() {
        let events = |eax, ebx| {
            let profile = add_to(Profile::new(), &processor(&[(0xa, 0, [eax, ebx, 0, 0])]));
            let event = profile.items().iter().find(|item| item.path == EVENTS);
            event.map(|item| item.value.clone())
        };
        assert_eq!(events(0x0700_0000, 0x41), Some(Value::Bits(vec![0x3e])));
        assert_eq!(events(0x0200_0000, 0), Some(Value::Bits(vec![0b11])));
        assert_eq!(events(ALL, ALL), Some(Value::Bits(vec![0])));
        assert_eq!([6, 63].map(|event| name(EVENTS, event)), ["branch-misses", "bit 63"]);
    }

    #[test]
    fn what_belongs_to_a_feature_counts_only_with_it() {
        let with = |feature: &str, leaf| {
            let mut features = processor(&[(7, 0, [0; 4]), (7, 1, [0; 4]), leaf]);
            let kept = Features::of(&features).with(Features::named(feature));
            kept.write(&mut features);
            add_to(Profile::new(), &features)
        };
        let palette = (0x1d, 1, [0x0400_2000, 0x0008_0040, 16, 0]);
        let guest = with("amx_tile", palette);
        for (host, fits) in [
            (with("amx_tile", palette), true),
            (with("amx_tile", (0x1d, 1, [0x0400_2000, 0x0008_0080, 16, 0])), false),
            (with("sse2", palette), false),
        ] {
            assert_eq!(agree(&guest, &host).is_ok(), fits);
        }
        agree(&with("sse2", palette), &with("sse2", (1, 0, [0; 4]))).unwrap();
        let avx10 = |version: u32| with("avx10", (0x24, 0, [0, 7 << 16 | version, 0, 0]));
        agree(&avx10(1), &avx10(2)).unwrap();
        assert_eq!(agree(&avx10(2), &avx10(1)).unwrap_err()[0].path, "cpu/avx10/version");
    }
}
