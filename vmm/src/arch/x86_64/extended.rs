//! The parts of a processor's extended state, as CPUID leaf 0xd tells of them (SDM vol. 1, 13.2).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::cpuid;
use super::feature::Features;

const LEAF: u32 = 0xd;
/// Bytes that every XSAVE area has: what FXSAVE writes, and the header.
const LEAST: u32 = 576;

/// Parts by number: their names, and the features without which nobody has them.
const PARTS: [(u32, &str, Option<&str>); 17] = [
    (0, "x87", None),
    (1, "sse", None),
    (2, "avx", Some("avx")),
    (3, "mpx-bounds", Some("mpx")),
    (4, "mpx-config", Some("mpx")),
    (5, "avx512-masks", Some("avx512f")),
    (6, "avx512-upper-halves", Some("avx512f")),
    (7, "avx512-upper-registers", Some("avx512f")),
    (8, "processor-trace", Some("intel_pt")),
    (9, "protection-keys", Some("pku")),
    (10, "pasid", Some("enqcmd")),
    (11, "cet-user", Some("shstk")),
    (12, "cet-supervisor", Some("shstk")),
    (14, "user-interrupts", Some("uintr")),
    (15, "last-branches", Some("arch_lbr")),
    (17, "tile-config", Some("amx_tile")),
    (18, "tile-data", Some("amx_tile")),
];

/// One part, and where it is in an XSAVE area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    number: u32,
    /// Bytes.
    size: u32,
    /// Bytes from the start; 0 of those that have no fixed place.
    offset: u32,
}

impl Part {
    /// As a number that is the same for two parts only if they are alike.
    pub(crate) fn code(self) -> u64 {
        // A part is within a page or few; what is not, is unlike everything else as well.
        u64::from(self.number) << 56
            | u64::from(self.size & 0xfff_ffff) << 28
            | u64::from(self.offset & 0xfff_ffff)
    }

    /// For people, what [`Part::code`] gave.
    pub(crate) fn describe(code: u64) -> String {
        let (number, size, offset) = (code >> 56, code >> 28 & 0xfff_ffff, code & 0xfff_ffff);
        let named = PARTS.iter().find(|(known, _, _)| u64::from(*known) == number);
        let name = named.map_or_else(|| format!("part {number}"), |(_, name, _)| (*name).into());
        format!("{name} of {size} bytes at {offset}")
    }
}

/// The parts that `cpuid` tells of, but for the first two, which are everywhere alike.
pub(crate) fn parts(cpuid: &CpuId) -> Vec<Part> {
    let (user, supervisor) = enabled(cpuid);
    let leaves =
        cpuid.as_slice().iter().filter(|e| e.function == LEAF && (2..63).contains(&e.index));
    let there = leaves.filter(|leaf| (user | supervisor) >> leaf.index & 1 == 1);
    there.map(|leaf| Part { number: leaf.index, size: leaf.eax, offset: leaf.ebx }).collect()
}

/// Bytes of an XSAVE area with all that `cpuid` tells of, in the standard form.
pub(crate) fn bytes(cpuid: &CpuId) -> u32 {
    let ends = parts(cpuid).into_iter().filter(|part| part.offset != 0);
    ends.map(|part| part.offset.saturating_add(part.size)).max().unwrap_or(0).max(LEAST)
}

/// The parts that instructions of any program can reach, a bit for each (XCR0).
pub(crate) fn user_parts(cpuid: &CpuId) -> u64 {
    enabled(cpuid).0
}

/// The low and the high word of a set of parts.
pub(crate) fn halves(parts: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = parts.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

/// The entries of `cpuid` without those parts that belong to a feature that is not `shown`; with
/// the parts that are not known here only if they are `extra`.
pub(crate) fn limited(cpuid: &CpuId, shown: Features, extra: bool) -> Vec<kvm_cpuid_entry2> {
    let all = cpuid.as_slice().iter().copied();
    if !shown.has(Features::named("xsave")) {
        return all.filter(|entry| entry.function != LEAF).collect();
    }
    let is_allowed = |number: u32| match PARTS.iter().find(|(known, _, _)| *known == number) {
        Some((_, _, Some(feature))) => shown.has(Features::named(feature)),
        Some((_, _, None)) => true,
        None => extra,
    };
    let allowed = (0..63).filter(|&n| is_allowed(n)).fold(0_u64, |all, n| all | 1 << n);
    let [low, high] = halves(allowed);
    let kept = all.filter(|e| e.function != LEAF || e.index < 2 || is_allowed(e.index));
    let mut entries: Vec<_> = kept.collect();
    for entry in entries.iter_mut().filter(|entry| entry.function == LEAF) {
        match entry.index {
            0 => (entry.eax, entry.edx) = (entry.eax & low, entry.edx & high),
            1 => (entry.ecx, entry.edx) = (entry.ecx & low, entry.edx & high),
            _ => {}
        }
    }
    let area = CpuId::from_entries(&entries).map_or(LEAST, |cpuid| bytes(&cpuid));
    // EBX is for what is switched on: KVM keeps it.
    if let Some(entry) = entries.iter_mut().find(|e| e.function == LEAF && e.index == 0) {
        entry.ecx = area;
    }
    entries
}

/// The parts that `cpuid` has: for programs, and for the system alone.
fn enabled(cpuid: &CpuId) -> (u64, u64) {
    let leaf = |index| cpuid::leaf(cpuid, LEAF, index).unwrap_or_default();
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    (join(leaf(0).eax, leaf(0).edx), join(leaf(1).ecx, leaf(1).edx))
}
