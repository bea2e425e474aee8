//! What the guest is told of its physical address space.

use migration::ram;

use crate::arch::layout;
use crate::memory::Ram;

/// What a range of addresses may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ram,
    Reserved,
}

impl Kind {
    /// The type in an E820 table, and in that of PVH (ACPI 6.5, 15.1).
    pub(super) fn e820(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// A range of physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
}

/// The ranges in ascending order: conventional memory, tables, the rest of RAM, and
/// PCI's configuration space.
pub(super) fn memory_map(ram: &Ram) -> Vec<Range> {
    let range = |start, end, kind| Range { start, len: end - start, kind };
    let mut map = vec![
        range(0, layout::LOWMEM_END, Kind::Ram),
        range(layout::ACPI_TABLES, layout::HIMEM, Kind::Reserved),
    ];
    let ranges = ram::layout(ram).into_iter();
    map.extend(ranges.map(|(start, len)| range(start.max(layout::HIMEM), start + len, Kind::Ram)));
    // Linux uses it only if it is told here that nothing else is there.
    map.push(range(layout::ECAM.start, layout::ECAM.end, Kind::Reserved));
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_map_ascends_without_overlap_and_ends_with_ram() {
        let ranges = layout::ram_ranges(5 << 30);
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(start, len)| (GuestAddress(start), usize::try_from(len).unwrap()))
            .collect();
        let map = memory_map(&Ram::from_ranges(&ranges).unwrap());
        assert!(map.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
        let last = map.last().unwrap();
        assert_eq!((last.start, last.len, last.kind), (4 << 30, 2 << 30, Kind::Ram));
    }
}
