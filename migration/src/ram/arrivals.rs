//! Which guest pages have come, as all connections tell it.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE, Ram, Run};

const WORD: usize = u64::BITS as usize;

/// A set of the pages of a [`Ram`] that many threads add to.
///
/// There is one of them however many connections carry memory: it takes 2 MiB for a guest of 64 GiB.
pub(super) struct Arrivals(Vec<Region>);

struct Region {
    start: u64,
    pages: usize,
    /// Bit n of word m is page 64 m + n.
    words: Vec<AtomicU64>,
}

impl Arrivals {
    /// No page of `ram`.
    pub(super) fn none(ram: &Ram) -> Self {
        let region = |region: &<Ram as GuestMemoryBackend>::R| {
            let pages = usize::try_from(region.len() / PAGE).expect("mapped memory is countable");
            let mut words = Vec::new();
            words.resize_with(pages.div_ceil(WORD), AtomicU64::default);
            Region { start: region.start_addr().0, pages, words }
        };
        Self(ram.iter().map(region).collect())
    }

    /// Adds the pages of `run`, as far as there is guest memory.
    pub(super) fn insert(&self, run: Run) {
        let end = run.start.0.saturating_add(run.len);
        for region in &self.0 {
            let last = region.start + region.pages as u64 * PAGE;
            let (from, to) = (run.start.0.max(region.start), end.min(last));
            if from < to {
                let page = |offset: u64| usize::try_from(offset).expect("within the region");
                let first = page((from - region.start) / PAGE);
                region.insert(first, page((to - region.start).div_ceil(PAGE)));
            }
        }
    }

    /// Whether it holds every page: meant for when nobody adds any more.
    pub(super) fn is_all(&self) -> bool {
        self.0.iter().all(|region| {
            let words = region.words.iter().enumerate();
            words.into_iter().all(|(index, word)| {
                let missing = !word.load(Ordering::Relaxed);
                missing & below(region.pages - index * WORD) == 0
            })
        })
    }
}

impl Region {
    /// Adds the pages from `first` to before `past`.
    fn insert(&self, first: usize, past: usize) {
        for index in first / WORD..past.div_ceil(WORD) {
            let start = index * WORD;
            let bits = below(past - start) & !below(first.saturating_sub(start));
            // What a thread adds orders nothing: who looks at all has joined all.
            self.words[index].fetch_or(bits, Ordering::Relaxed);
        }
    }
}

/// The lowest `count` bits, at most all.
fn below(count: usize) -> u64 {
    if count < WORD { (1 << count) - 1 } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use std::thread::{Builder, scope};

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::ram::PageBitmap;

    const LOW: u64 = 0x10_0000;
    const HIGH: u64 = 0x1_0000_0000;

    /// 70 pages at 1 MiB and 256 at 4 GiB.
    fn ram() -> Ram {
        let region = |start, pages| (GuestAddress(start), pages * super::super::PAGE_BYTES);
        Ram::from_ranges(&[region(LOW, 70), region(HIGH, 256)]).unwrap()
    }

    fn run(page: u64, pages: u64) -> Run {
        Run { start: GuestAddress(HIGH + page * PAGE), len: pages * PAGE }
    }

    #[test]
    fn all_is_every_page_of_every_region() {
        for missing in [0, 63, 64, 255] {
            let all = Arrivals::none(&ram());
            all.insert(Run { start: GuestAddress(LOW), len: 70 * PAGE });
            all.insert(run(0, missing));
            all.insert(run(missing + 1, 255 - missing));
            assert!(!all.is_all(), "page {missing} is missing");
            all.insert(run(missing, 1));
            assert!(all.is_all());
        }
        let low = Arrivals::none(&ram());
        low.insert(run(0, 256));
        low.insert(Run { start: GuestAddress(LOW), len: 69 * PAGE });
        assert!(!low.is_all());
    }

    #[test]
    fn nothing_is_lost_between_threads() {
        let all = Arrivals::none(&ram());
        all.insert(Run { start: GuestAddress(LOW), len: 70 * PAGE });
        scope(|threads| {
            for thread in 0..4 {
                let all = &all;
                let insert =
                    move || (thread..256).step_by(4).for_each(|page| all.insert(run(page, 1)));
                Builder::new().spawn_scoped(threads, insert).unwrap();
            }
        });
        assert!(all.is_all());
    }

    proptest! {
        #[test]
        fn it_holds_what_a_plain_set_holds(
            runs in prop::collection::vec((0..300_u64, 0..300_u64), 0..6),
        ) {
            let (arrivals, mut plain) = (Arrivals::none(&ram()), PageBitmap::empty(&ram()));
            for (page, pages) in runs {
                arrivals.insert(run(page, pages));
                plain.insert(run(page, pages).start, run(page, pages).len);
            }
            let held = arrivals.0[1].words.iter().map(|word| word.load(Ordering::Relaxed));
            let windows: Vec<_> = plain.windows(64).collect();
            for (index, held) in held.enumerate() {
                let start = run(64 * index as u64, 0).start;
                let words = windows.iter().find(|window| window.start == start);
                prop_assert_eq!(held, words.map_or(0, |window| window.words[0]));
            }
            prop_assert!(!arrivals.is_all(), "the other region is missing");
        }
    }
}
