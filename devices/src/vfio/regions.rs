//! What base address registers decode: the device's own memory where it can be mapped, and
//! accesses one by one where it cannot.

use std::ops::Range;
use std::sync::Arc;

use super::hardware::Hardware;
use crate::direct::{DirectMap, HostMemory, Mapped, PAGE};

/// The part of a region that the guest can be given, and where it is now.
pub(super) struct Window {
    parts: Vec<(u64, Arc<HostMemory>)>,
    placed: Vec<Box<dyn Mapped>>,
}

impl Window {
    /// Maps all of `region` that can be mapped, but for the pages that have any of `kept` in them.
    ///
    /// What cannot be mapped can still be accessed.
    pub(super) fn open(hardware: &dyn Hardware, region: u32, kept: &[Range<u64>]) -> Self {
        let mut parts = Vec::new();
        for range in without(&hardware.region(region).mappable, kept) {
            let start = range.start;
            match hardware.map(region, range) {
                Ok(memory) => parts.push((start, Arc::new(memory))),
                Err(error) => tracing::warn!(region, start, %error, "not mapped: accesses trap"),
            }
        }
        Self { parts, placed: Vec::new() }
    }

    /// Puts it where the base address register is now, or nowhere.
    pub(super) fn place(&mut self, direct: &dyn DirectMap, at: Option<u64>) {
        self.placed.clear();
        let Some(at) = at else { return };
        for (offset, memory) in &self.parts {
            match direct.map(at + offset, memory) {
                Ok(mapped) => self.placed.push(mapped),
                Err(error) => tracing::warn!(at, offset, %error, "not mapped: accesses trap"),
            }
        }
    }
}

/// The whole pages of `ranges` without the pages that have any of `kept` in them.
fn without(ranges: &[Range<u64>], kept: &[Range<u64>]) -> Vec<Range<u64>> {
    let down = |address: u64| address & !(PAGE - 1);
    let up = |address: u64| down(address.saturating_add(PAGE - 1));
    let mut left: Vec<_> = ranges.iter().map(|range| up(range.start)..down(range.end)).collect();
    for hole in kept.iter().filter(|hole| !hole.is_empty()) {
        let hole = down(hole.start)..up(hole.end);
        let parts = left.iter().flat_map(|range| {
            let before = range.start..range.end.min(hole.start);
            let after = range.start.max(hole.end)..range.end;
            [before, after]
        });
        left = parts.collect();
    }
    left.retain(|range| range.start < range.end);
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is left of the page-aligned `start..end`.
    fn left(start: u64, end: u64, kept: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let kept: Vec<_> = kept.iter().map(|(start, end)| *start..*end).collect();
        let left = without(std::slice::from_ref(&(start..end)), &kept);
        left.into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn the_pages_of_an_interrupt_table_stay_with_us() {
        let two = [(0x1000, 0x2000), (0x3000, 0x4000)];
        assert_eq!(left(0, 0x4000, &[(0, 0x30), (0x2000, 0x2008)]), two);
        assert_eq!(left(0, 0x4000, &[(0x1ff0, 0x2010)]), [(0, 0x1000), (0x3000, 0x4000)]);
        assert_eq!(left(0, 0x1000, &[(0x800, 0x810)]), []);
        assert_eq!(left(0x1800, 0x4800, &[]), [(0x2000, 0x4000)]);
        assert_eq!(left(0, 0x2000, &[(0x900, 0x900)]), [(0, 0x2000)], "an empty table is none");
    }

    proptest! {
        #[test]
        fn what_is_left_is_whole_pages_of_what_was_there_and_nothing_kept(
            (start, len) in (0u64..0x8000, 0u64..0x8000),
            kept in prop::collection::vec((0u64..0xf000, 1u64..0x2000), 0..4),
        ) {
            let kept: Vec<_> = kept.into_iter().map(|(start, len)| start..start + len).collect();
            for range in without(std::slice::from_ref(&(start..start + len)), &kept) {
                prop_assert!(start <= range.start && range.start < range.end && range.end <= start + len);
                prop_assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE));
                for hole in &kept {
                    prop_assert!(range.end <= hole.start || hole.end <= range.start);
                }
            }
        }
    }
}
