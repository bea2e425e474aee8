//! What tells of the writes of a fake guest.

use std::io;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::fake::VcpuState;
use crate::ram::{DirtySet, DirtySource, OwnWrites, PAGE, PageBitmap, Ram, Window};

/// `source`, which is asked only when `vcpu` wrote again, if it writes: so that each pass finds
/// something written, however seldom this machine lets that thread run.
pub(super) fn behind(vcpu: &VcpuState, source: impl DirtySource + 'static) -> DirtySet {
    let mut set = DirtySet::new();
    set.add(Awaited { vcpu: vcpu.clone(), count: vcpu.count.load(Ordering::Relaxed) });
    set.add(source);
    set
}

/// See [`behind`].
struct Awaited {
    vcpu: VcpuState,
    count: u64,
}

impl Awaited {
    fn is_to_write(&self) -> bool {
        let is_same = self.vcpu.count.load(Ordering::Relaxed) == self.count;
        is_same && self.vcpu.writes.load(Ordering::Relaxed) && *self.vcpu.running.lock().unwrap()
    }
}

impl DirtySource for Awaited {
    fn name(&self) -> &'static str {
        "the vCPU"
    }
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn collect(&mut self, _: &mut PageBitmap) -> io::Result<()> {
        let patience = Instant::now() + Duration::from_secs(1);
        while self.is_to_write() && Instant::now() < patience {
            thread::sleep(Duration::from_millis(1));
        }
        self.count = self.vcpu.count.load(Ordering::Relaxed);
        Ok(())
    }
    fn stop(&mut self) {}
}

/// A source that remembers every write until it is told to forget it, and starts with all pages,
/// as KVM's log can.
pub(super) struct Ledger {
    own: OwnWrites,
    written: PageBitmap,
    /// Refuses to forget from this call on.
    fails_at: Option<u32>,
}

impl Ledger {
    pub(super) fn new(ram: &Ram, fails_at: Option<u32>) -> Self {
        Self { own: OwnWrites::new(ram.clone()), written: PageBitmap::empty(ram), fails_at }
    }
}

impl DirtySource for Ledger {
    fn name(&self) -> &'static str {
        "the ledger"
    }
    fn start(&mut self) -> io::Result<()> {
        self.written = PageBitmap::full(self.own.ram());
        self.own.start()
    }
    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        self.own.collect(&mut self.written)?;
        pages.unite(&self.written);
        Ok(())
    }
    fn forget(&mut self, pages: &Window<'_>) -> io::Result<()> {
        if let Some(left) = &mut self.fails_at {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::Unsupported)?;
        }
        self.own.collect(&mut self.written)?;
        self.written.subtract(pages);
        Ok(())
    }
    fn stop(&mut self) {
        self.written.clear();
    }
}

/// A vCPU that writes more pages than are sent meanwhile. It writes when it is asked what it wrote:
/// however fast the machine is, it is as much faster than the wire.
pub(super) struct Busy {
    own: OwnWrites,
    vcpu: VcpuState,
    /// Pages since it wrote last.
    sent: u64,
    tells: bool,
    by_vcpu: Vec<u64>,
}

impl Busy {
    /// How many pages it writes at full speed while a hundred are sent.
    const PER_HUNDRED: u64 = 120;
    /// Where: the first page, and how many from there on.
    const PLACE: (u64, u64) = (300, 256);

    pub(super) fn new(ram: &Ram, vcpu: VcpuState, tells: bool) -> Self {
        Self { own: OwnWrites::new(ram.clone()), vcpu, sent: 0, tells, by_vcpu: vec![] }
    }

    fn write(&self) {
        let share = 100 - u64::from(self.vcpu.throttle.load(Ordering::Relaxed));
        let (first, most) = Self::PLACE;
        let pages = (self.sent * Self::PER_HUNDRED * share / 10_000).min(most);
        (0..pages).for_each(|_| self.vcpu.write(self.own.ram(), first, most));
    }
}

impl DirtySource for Busy {
    fn name(&self) -> &'static str {
        "the busy vCPU"
    }
    fn start(&mut self) -> io::Result<()> {
        self.own.start()
    }
    fn collect(&mut self, pages: &mut PageBitmap) -> io::Result<()> {
        if *self.vcpu.running.lock().unwrap() {
            self.write();
        }
        self.sent = 0;
        let mut written = PageBitmap::empty(self.own.ram());
        self.own.collect(&mut written)?;
        if self.tells {
            self.by_vcpu = vec![written.count(), 0];
        }
        pages.unite(&written);
        Ok(())
    }
    fn forget(&mut self, pages: &Window<'_>) -> io::Result<()> {
        self.sent += pages.runs().map(|run| run.len / PAGE).sum::<u64>();
        Ok(())
    }
    fn by_vcpu(&self) -> &[u64] {
        &self.by_vcpu
    }
    fn stop(&mut self) {}
}
