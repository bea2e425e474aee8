//! A set of guest pages.

use std::io;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{PAGE, Ram};

const WORD: usize = u64::BITS as usize;

/// Consecutive pages of one region: `start` is a guest-physical address, `len` counts bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first byte.
    pub start: GuestAddress,
    /// Bytes, a multiple of [`PAGE`].
    pub len: u64,
}

/// A part of the pages of one region: bit n of word m is page 64 m + n from `start` on.
///
/// The page at `start` is a multiple of 64 pages into its region, and so is the page behind the
/// part, unless the region ends there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window<'a> {
    /// Guest-physical address of the first page.
    pub start: GuestAddress,
    /// How many pages the part has, in the set or not.
    pub pages: usize,
    /// Which of them are in the set; bits past the last page are clear.
    pub words: &'a [u64],
}

/// A set of the pages of a [`Ram`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    regions: Vec<Region>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    pages: usize,
    /// Bit n of word m is page 64 m + n; bits past the last page are always clear.
    words: Vec<u64>,
}

impl PageBitmap {
    /// No page of `ram`.
    ///
    /// # Panics
    /// If a region is not made of whole pages.
    #[must_use]
    pub fn empty(ram: &Ram) -> Self {
        let region = |region: &<Ram as GuestMemoryBackend>::R| {
            assert_eq!(region.len() % PAGE, 0, "guest memory comes in whole pages");
            let pages = usize::try_from(region.len() / PAGE).expect("mapped memory is countable");
            let words = vec![0; pages.div_ceil(WORD)];
            Region { start: region.start_addr().raw_value(), pages, words }
        };
        Self { regions: ram.iter().map(region).collect() }
    }

    /// Every page of `ram`.
    #[must_use]
    pub fn full(ram: &Ram) -> Self {
        let mut all = Self::empty(ram);
        for region in &mut all.regions {
            region.words.fill(u64::MAX);
            region.clear_tail();
        }
        all
    }

    /// Adds the pages whose bits are set in `words`, whose first bit is the page at `start`.
    ///
    /// This is how KVM and VFIO report. Bits past the end of the region of `start` mean nothing.
    /// Fails if `start` is not the address of a page of the guest.
    pub fn merge(&mut self, start: GuestAddress, words: &[u64]) -> io::Result<()> {
        let (region, first) = self.find(start).ok_or_else(|| {
            let why = format!("a dirty log starts at {:#x}, where no guest page is", start.0);
            io::Error::new(io::ErrorKind::InvalidInput, why)
        })?;
        let (skip, shift) = (first / WORD, first % WORD);
        for (i, &word) in words.iter().enumerate().filter(|&(_, &word)| word != 0) {
            if let Some(low) = region.words.get_mut(skip + i) {
                *low |= word << shift;
            }
            if shift != 0
                && let Some(high) = region.words.get_mut(skip + i + 1)
            {
                *high |= word >> (WORD - shift);
            }
        }
        region.clear_tail();
        Ok(())
    }

    /// Adds the page that starts at `page`, if there is one: whether it was not in the set.
    pub fn add(&mut self, page: GuestAddress) -> bool {
        self.find(page).is_some_and(|(region, page)| {
            let (word, bit) = (&mut region.words[page / WORD], 1 << (page % WORD));
            let is_new = *word & bit == 0;
            *word |= bit;
            is_new
        })
    }

    /// Adds each page that `len` bytes at `start` touch, as far as there is guest memory.
    pub fn insert(&mut self, start: GuestAddress, len: u64) {
        let end = start.0.saturating_add(len);
        for region in &mut self.regions {
            let last = region.start + region.pages as u64 * PAGE;
            let (from, to) = (start.0.max(region.start), end.min(last));
            if from < to {
                let page = |offset: u64| usize::try_from(offset).expect("within the region");
                let first = page((from - region.start) / PAGE);
                let past = page((to - region.start).div_ceil(PAGE));
                (first..past).for_each(|page| region.words[page / WORD] |= 1 << (page % WORD));
            }
        }
    }

    /// Adds what `other`, of the same memory, holds.
    pub fn unite(&mut self, other: &Self) {
        for (region, other) in self.regions.iter_mut().zip(&other.regions) {
            region.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
        }
    }

    /// Removes what is in `window`, of the same memory.
    pub fn subtract(&mut self, window: &Window<'_>) {
        if let Some((region, first)) = self.find(window.start) {
            let words = region.words.iter_mut().skip(first / WORD);
            words.zip(window.words).for_each(|(word, remove)| *word &= !remove);
        }
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.regions.iter_mut().for_each(|region| region.words.fill(0));
    }

    /// How many pages it holds.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether it holds no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words().all(|word| word == 0)
    }

    /// Its pages as the fewest runs, in order of address.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.regions.iter().flat_map(|region| region.whole().runs())
    }

    /// Its pages by parts of at most `pages` pages, a multiple of 64, in order of address; parts
    /// without a page in the set are left out.
    ///
    /// # Panics
    /// If `pages` is no multiple of 64.
    pub fn windows(&self, pages: usize) -> impl Iterator<Item = Window<'_>> {
        self.windows_by_region(pages).flatten()
    }

    /// The same, for each region of the memory.
    ///
    /// # Panics
    /// If `pages` is no multiple of 64.
    pub fn windows_by_region(
        &self,
        pages: usize,
    ) -> impl ExactSizeIterator<Item = impl Iterator<Item = Window<'_>>> {
        assert!(pages > 0 && pages.is_multiple_of(WORD), "windows are made of whole words");
        self.regions.iter().map(move |region| {
            let parts = (0..).step_by(pages).zip(region.words.chunks(pages / WORD));
            let parts = parts.map(move |(first, words)| Window {
                start: GuestAddress(region.start + first as u64 * PAGE),
                pages: pages.min(region.pages - first),
                words,
            });
            parts.filter(|part| part.words.iter().any(|&word| word != 0))
        })
    }

    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions.iter().flat_map(|region| region.words.iter().copied())
    }

    /// The region that holds the page at exactly `start`, and the number of that page in it.
    fn find(&mut self, start: GuestAddress) -> Option<(&mut Region, usize)> {
        self.regions.iter_mut().find_map(|region| {
            let offset = start.0.checked_sub(region.start)?;
            let page = usize::try_from(offset / PAGE).ok()?;
            (offset % PAGE == 0 && page < region.pages).then_some((region, page))
        })
    }
}

impl Region {
    fn clear_tail(&mut self) {
        let used = self.pages % WORD;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    fn whole(&self) -> Window<'_> {
        Window { start: GuestAddress(self.start), pages: self.pages, words: &self.words }
    }
}

impl<'a> Window<'a> {
    /// Its pages in the set as the fewest runs, in order of address.
    pub fn runs(self) -> impl Iterator<Item = Run> + 'a {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.seek(next, true);
            next = self.seek(first, false);
            let run = Run {
                start: GuestAddress(self.start.0 + first as u64 * PAGE),
                len: (next - first) as u64 * PAGE,
            };
            (first < self.pages).then_some(run)
        })
    }

    /// The first page from `page` on that is in the set, or that is not; else the page count.
    fn seek(&self, page: usize, wanted: bool) -> usize {
        let mut below = page % WORD;
        for (index, &word) in self.words.iter().enumerate().skip(page / WORD) {
            let word = if wanted { word } else { !word } & (u64::MAX << below);
            if word != 0 {
                return self.pages.min(index * WORD + word.trailing_zeros() as usize);
            }
            below = 0;
        }
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const LOW: u64 = 0x10_0000;
    const HIGH: u64 = 0x1_0000_0000;

    /// 70 pages at 1 MiB and 200 at 4 GiB.
    fn ram() -> Ram {
        let pages = |n: usize| n * 4096;
        Ram::from_ranges(&[(GuestAddress(LOW), pages(70)), (GuestAddress(HIGH), pages(200))])
            .unwrap()
    }

    fn pages(bitmap: &PageBitmap) -> BTreeSet<u64> {
        bitmap
            .runs()
            .flat_map(|run| (0..run.len / PAGE).map(move |i| run.start.0 + i * PAGE))
            .collect()
    }

    #[test]
    fn all_of_ram_is_one_run_per_region() {
        let all = PageBitmap::full(&ram());
        assert_eq!(all.count(), 270);
        let runs: Vec<_> = all.runs().map(|run| (run.start.0, run.len / PAGE)).collect();
        assert_eq!(runs, [(LOW, 70), (HIGH, 200)]);
    }

    #[test]
    fn a_log_that_starts_where_no_page_is_gets_refused() {
        let mut bitmap = PageBitmap::empty(&ram());
        for start in [0, LOW - PAGE, LOW + 1, LOW + 70 * PAGE, HIGH + 200 * PAGE, u64::MAX] {
            assert!(bitmap.merge(GuestAddress(start), &[1]).is_err(), "{start:#x}");
        }
        assert!(bitmap.is_empty());
    }

    #[test]
    fn bits_past_the_end_of_a_region_are_ignored() {
        let mut bitmap = PageBitmap::empty(&ram());
        bitmap.merge(GuestAddress(LOW), &[0, u64::MAX, u64::MAX]).unwrap();
        assert_eq!(bitmap.count(), 6);
    }

    #[test]
    fn inserting_touches_every_page_of_a_range() {
        let mut bitmap = PageBitmap::empty(&ram());
        bitmap.insert(GuestAddress(LOW + 5000), 4096);
        bitmap.insert(GuestAddress(HIGH - 1), 2);
        bitmap.insert(GuestAddress(0), 10);
        bitmap.insert(GuestAddress(LOW), 0);
        assert_eq!(pages(&bitmap), BTreeSet::from([LOW + PAGE, LOW + 2 * PAGE, HIGH]));
    }

    #[test]
    fn a_page_is_new_once() {
        let mut bitmap = PageBitmap::empty(&ram());
        for page in [LOW, LOW + 69 * PAGE, HIGH, HIGH + 65 * PAGE] {
            assert!(bitmap.add(GuestAddress(page)) && !bitmap.add(GuestAddress(page)));
        }
        for none in [0, LOW + 1, LOW - PAGE, LOW + 70 * PAGE, HIGH + 200 * PAGE, u64::MAX] {
            assert!(!bitmap.add(GuestAddress(none)));
        }
        assert_eq!(bitmap.count(), 4);
    }

    proptest! {
        #[test]
        fn merging_at_any_page_is_what_the_bits_say(
            first in 0..200u64,
            words in prop::collection::vec(any::<u64>(), 0..5),
        ) {
            let mut bitmap = PageBitmap::empty(&ram());
            bitmap.merge(GuestAddress(HIGH + first * PAGE), &words).unwrap();
            let set = (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1);
            let expected: BTreeSet<_> = set
                .map(|bit| first + bit as u64)
                .filter(|&page| page < 200)
                .map(|page| HIGH + page * PAGE)
                .collect();
            prop_assert_eq!(bitmap.count(), expected.len() as u64);
            prop_assert_eq!(pages(&bitmap), expected);
        }

        #[test]
        fn runs_never_touch_each_other(words in prop::collection::vec(any::<u64>(), 1..5)) {
            let mut bitmap = PageBitmap::empty(&ram());
            bitmap.merge(GuestAddress(HIGH), &words).unwrap();
            let runs: Vec<_> = bitmap.runs().collect();
            for pair in runs.windows(2) {
                prop_assert!(pair[0].start.0 + pair[0].len < pair[1].start.0);
            }
        }

        #[test]
        fn windows_hold_every_page_once(words in any::<[u64; 4]>(), size in 1..6usize) {
            let mut bitmap = PageBitmap::empty(&ram());
            bitmap.merge(GuestAddress(LOW), &words).unwrap();
            bitmap.merge(GuestAddress(HIGH), &words).unwrap();
            let mut again = PageBitmap::empty(&ram());
            let mut end = 0;
            for window in bitmap.windows(size * 64) {
                prop_assert!(window.start.0 >= end);
                end = window.start.0 + window.pages as u64 * PAGE;
                prop_assert!(window.pages <= size * 64 && window.words.len() <= size);
                let last = [LOW + 70 * PAGE, HIGH + 200 * PAGE].contains(&end);
                prop_assert!(last || window.pages == size * 64);
                let base = if window.start.0 < HIGH { LOW } else { HIGH };
                prop_assert_eq!((window.start.0 - base) % (64 * PAGE), 0);
                again.merge(window.start, window.words).unwrap();
                let runs: u64 = window.runs().map(|run| run.len / PAGE).sum();
                prop_assert!(runs > 0, "an empty part is left out");
            }
            prop_assert_eq!(&again, &bitmap);
            for window in bitmap.windows(size * 64) {
                again.subtract(&window);
            }
            prop_assert!(again.is_empty());
        }

        #[test]
        fn uniting_adds_and_keeps(a in any::<[u64; 3]>(), b in any::<[u64; 3]>()) {
            let of = |words: [u64; 3]| {
                let mut bitmap = PageBitmap::empty(&ram());
                bitmap.merge(GuestAddress(HIGH), &words).unwrap();
                bitmap
            };
            let mut both = of(a);
            both.unite(&of(b));
            prop_assert_eq!(pages(&both), &pages(&of(a)) | &pages(&of(b)));
        }
    }
}
