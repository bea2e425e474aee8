//! Who writes guest memory, and asking each of them what it wrote.

use std::io;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::{PageBitmap, Ram, Run, Window};

/// One of those that can write guest memory, and remembers where it did.
pub trait DirtySource: Send {
    /// What writes, for plans and errors: `kvm`, `own writes`.
    fn name(&self) -> &str;

    /// Starts to remember. What was written before does not count, and may be reported.
    fn start(&mut self) -> io::Result<()>;

    /// Adds to `pages` every page written since the previous call, or since the start.
    ///
    /// A page may be reported that did not change. A page that changed must be reported, and one
    /// that changes from now on is for the next call.
    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()>;

    /// Forgets the writes to `pages`, which are read next; writes from now on are for the next
    /// `collect`.
    ///
    /// A source that `collect` makes forget, as most do, has nothing to do here. One that does not
    /// saves that time there, and a page that is written once more before it is read is not sent
    /// twice. What is not in the set is not forgotten.
    fn forget(&mut self, pages: &Window<'_>) -> io::Result<()> {
        let _ = pages;
        Ok(())
    }

    /// How many pages became dirty by each vCPU between the last `collect` and the one before it;
    /// empty if this source cannot tell. A page that was forgotten meanwhile counts again.
    fn by_vcpu(&self) -> &[u64] {
        &[]
    }

    /// Stops to remember. Called also where `start` failed or never ran.
    fn stop(&mut self);
}

/// All of them. KVM's log belongs last: what the others do may show up in it.
#[derive(Default)]
pub struct DirtySet {
    sources: Vec<Box<dyn DirtySource>>,
}

/// A dirty source could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} of {name}")]
pub struct DirtyError {
    what: &'static str,
    name: String,
    source: io::Error,
}

impl DirtySet {
    /// No source.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `source` behind those added before.
    pub fn add(&mut self, source: impl DirtySource + 'static) {
        self.sources.push(Box::new(source));
    }

    /// The names of all sources, in the order of collection.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|source| source.name())
    }

    /// Starts every source; if one fails, none remembers.
    pub fn start(&mut self) -> Result<(), DirtyError> {
        let started = self.each("start the dirty log", |source| source.start());
        if started.is_err() {
            self.stop();
        }
        started
    }

    /// Adds to `pages` what anyone wrote since the previous call.
    pub fn collect(&mut self, pages: &mut PageBitmap) -> Result<(), DirtyError> {
        self.each("read the dirty log", |source| source.collect(pages))
    }

    /// How many pages became dirty by each vCPU before the last `collect` and after the one before
    /// it, if there is a source that can tell.
    #[must_use]
    pub fn by_vcpu(&self) -> &[u64] {
        let told = self.sources.iter().map(|source| source.by_vcpu());
        told.into_iter().find(|counts| !counts.is_empty()).unwrap_or_default()
    }

    /// Has every source forget the writes to `pages`, which are read next.
    pub fn forget(&mut self, pages: &Window<'_>) -> Result<(), DirtyError> {
        self.each("clear the dirty log", |source| source.forget(pages))
    }

    /// Collects into `pages`, which must be empty, and tells who reported the first page if any.
    pub fn culprit(&mut self, pages: &mut PageBitmap) -> Result<Option<(String, Run)>, DirtyError> {
        let mut culprit = None;
        self.each("read the dirty log", |source| {
            source.collect(pages)?;
            if culprit.is_none() {
                culprit = pages.runs().next().map(|run| (source.name().to_owned(), run));
            }
            Ok(())
        })?;
        Ok(culprit)
    }

    /// Stops every source, in reverse.
    pub fn stop(&mut self) {
        self.sources.iter_mut().rev().for_each(|source| source.stop());
    }

    fn each(
        &mut self,
        what: &'static str,
        mut act: impl FnMut(&mut dyn DirtySource) -> io::Result<()>,
    ) -> Result<(), DirtyError> {
        self.sources.iter_mut().try_for_each(|source| {
            act(source.as_mut()).map_err(|error| DirtyError {
                what,
                name: source.name().to_owned(),
                source: error,
            })
        })
    }
}

/// What this process itself wrote through the bitmap of its [`Ram`].
#[derive(Debug)]
pub struct OwnWrites {
    ram: Ram,
}

impl OwnWrites {
    /// Reads the bitmap of `ram`; `Ram` clones share it.
    #[must_use]
    pub fn new(ram: Ram) -> Self {
        Self { ram }
    }

    /// Whose writes these are.
    #[cfg(test)]
    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }
}

impl DirtySource for OwnWrites {
    fn name(&self) -> &'static str {
        "own writes"
    }

    fn start(&mut self) -> io::Result<()> {
        self.ram.iter().for_each(|region| bitmap(region).reset());
        Ok(())
    }

    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        self.ram.iter().try_for_each(|region| {
            pages.merge(region.start_addr(), &bitmap(region).get_and_reset())
        })
    }

    fn stop(&mut self) {}
}

/// The whole bitmap of `region`; the trait of regions offers views of it only.
fn bitmap(region: &GuestRegionMmap<AtomicBitmap>) -> &AtomicBitmap {
    MmapRegion::bitmap(region)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x10_000), (GuestAddress(0x10_0000), 0x8000)]).unwrap()
    }

    #[test]
    fn own_writes_are_reported_once() {
        let ram = ram();
        ram.write_obj(1u8, GuestAddress(0x3000)).unwrap();
        let mut own = OwnWrites::new(ram.clone());
        own.start().unwrap();
        ram.write_slice(&[1; 8], GuestAddress(0x4ffc)).unwrap();
        ram.write_obj(1u8, GuestAddress(0x10_7fff)).unwrap();

        let mut pages = PageBitmap::empty(&ram);
        own.collect(&mut pages).unwrap();
        let runs: Vec<_> = pages.runs().map(|run| (run.start.0, run.len)).collect();
        assert_eq!(runs, [(0x4000, 0x2000), (0x10_7000, 0x1000)]);

        pages.clear();
        own.collect(&mut pages).unwrap();
        assert!(pages.is_empty());
    }

    struct Broken;

    impl DirtySource for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        fn start(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn collect(&mut self, _: &mut PageBitmap) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn stop(&mut self) {}
    }

    #[test]
    fn the_one_that_fails_is_named() {
        let mut set = DirtySet::new();
        set.add(OwnWrites::new(ram()));
        set.add(Broken);
        assert_eq!(set.start().unwrap_err().to_string(), "cannot start the dirty log of broken");
    }

    #[test]
    fn the_one_that_wrote_is_named() {
        let ram = ram();
        let mut set = DirtySet::new();
        set.add(OwnWrites::new(ram.clone()));
        set.start().unwrap();
        let mut pages = PageBitmap::empty(&ram);
        assert_eq!(set.culprit(&mut pages).unwrap(), None);
        ram.write_obj(1u8, GuestAddress(0x2345)).unwrap();
        let (name, run) = set.culprit(&mut pages).unwrap().unwrap();
        assert_eq!((name.as_str(), run.start.0), ("own writes", 0x2000));
    }
}
