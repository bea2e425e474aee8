//! A network function that is made of memory, and a machine that remembers what it is asked for.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::attention::Owner;
use super::function::{Machine, VfioFunction};
use super::hardware::{CONFIG, Hardware, Interrupt, Region};
use crate::direct::{DirectMap, HostMemory, Mapped};
use crate::irq::{LevelTrigger, Line, Message, Messages, Vector};

/// Where the fake's capabilities are.
pub(super) const POWER: u16 = 0x40;
pub(super) const MSI: u16 = 0x50;
pub(super) const MSIX: u16 = 0x70;
pub(super) const UNKNOWN: u16 = 0x80;
pub(super) const EXPRESS: u16 = 0xa0;
/// How many vectors it has.
pub(super) const VECTORS: u16 = 20;
/// Where its table and its pending bits are, in the base address register of this number.
pub(super) const TABLE_BAR: u8 = 2;
pub(super) const PENDING: u64 = 0x2000;
pub(super) const BAR_SIZE: u64 = 0x4000;

/// What was done to the fake, as it was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Deed {
    WroteConfig(u64, Vec<u8>),
    WroteBar(u32, u64, Vec<u8>),
    /// Interrupts from the second on, and which of them have an eventfd.
    Signals(Interrupt, u32, Vec<bool>),
    Disabled(Interrupt),
    UnmasksItself,
    Unmasked,
    Reset,
}

/// A function with two base address registers of 16 KiB and capabilities of many kinds.
pub(super) struct Fake {
    pub(super) config: Mutex<Vec<u8>>,
    pub(super) deeds: Mutex<Vec<Deed>>,
    pub(super) pin: bool,
    pub(super) can_reset: bool,
    unmasks_itself: bool,
    /// By kind and interrupt.
    eventfds: Mutex<BTreeMap<(Interrupt, u32), EventFd>>,
}

impl Fake {
    pub(super) fn new(pin: bool) -> Arc<Self> {
        let mut config = image();
        config[0x3d] = if pin { 2 } else { 0 };
        Arc::new(Self::with(config, pin, true))
    }

    /// One like a mediated device: it does not unmask its pin by itself, and even of the
    /// conventional configuration space it lacks a byte.
    pub(super) fn plain() -> Arc<Self> {
        let mut config = image();
        config[0x3d] = 1;
        config[0xfe] = 0x77;
        config.truncate(0xff);
        Arc::new(Self { unmasks_itself: false, ..Self::with(config, true, true) })
    }

    /// One that cannot be reset.
    pub(super) fn stubborn() -> Arc<Self> {
        Arc::new(Self::with(image(), false, false))
    }

    fn with(config: Vec<u8>, pin: bool, can_reset: bool) -> Self {
        let (deeds, eventfds) = (Mutex::default(), Mutex::default());
        let (config, unmasks_itself) = (Mutex::new(config), true);
        Self { config, deeds, pin, can_reset, unmasks_itself, eventfds }
    }

    pub(super) fn take(&self) -> Vec<Deed> {
        std::mem::take(&mut self.deeds.lock().unwrap())
    }

    /// What the command register got last.
    pub(super) fn command(&self) -> u16 {
        let config = self.config.lock().unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }

    /// Interrupts as the device does.
    pub(super) fn interrupt(&self, kind: Interrupt, number: u32) {
        self.eventfds.lock().unwrap()[&(kind, number)].write(1).unwrap();
    }

    fn did(&self, deed: Deed) {
        self.deeds.lock().unwrap().push(deed);
    }
}

/// A configuration space with everything that a guest must not see, and some that it must.
fn image() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |at: u16, bytes: &[u8]| {
        config[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    };
    put(0x00, &[0x86, 0x80, 0xca, 0x10, 0, 0, 0x10, 0, 1, 0, 0, 2, 0x10, 0, 0x80, 0]);
    put(0x10, &[0x0c, 0, 0, 0xfe, 0, 0, 0, 0]);
    put(0x18, &[0x00, 0, 0xab, 0xfe]);
    put(0x2c, &[0x86, 0x80, 0x01, 0xa0]);
    put(0x30, &[0x01, 0, 0xff, 0xff]);
    put(0x34, &[0x40]);
    // Power management with all there is, MSI of 4 vectors, MSI-X, an unknown one, PCI Express.
    put(POWER, &[1, 0x50, 0x23, 0xfe, 0x03, 1, 0, 0]);
    put(MSI, &[5, 0x70, 0x84, 0]);
    let [size, _] = (VECTORS - 1).to_le_bytes();
    put(MSIX, &[0x11, 0x80, size, 0, TABLE_BAR, 0, 0, 0, TABLE_BAR, 0x20, 0, 0]);
    put(UNKNOWN, &[0x14, 0xa0, 0x33, 0x33, 0x33]);
    put(EXPRESS, &[0x10, 0x00, 2, 0, 0x22, 0, 0, 0x10]);
    // ATS first, then a serial number, then SR-IOV.
    put(0x100, &[0x0f, 0, 0x01, 0x15, 0x77]);
    put(0x150, &[0x03, 0, 0x01, 0x20, 1, 2, 3, 4, 5, 6, 7, 8]);
    put(0x200, &[0x10, 0, 0x01, 0x00, 0x77]);
    config
}

impl Hardware for Fake {
    fn region(&self, region: u32) -> Region {
        match region {
            CONFIG => {
                let size = self.config.lock().unwrap().len().try_into().unwrap();
                Region { size, mappable: Vec::new() }
            }
            0 | 2 => Region { size: BAR_SIZE, mappable: std::iter::once(0..BAR_SIZE).collect() },
            _ => Region::default(),
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == CONFIG {
            let config = self.config.lock().unwrap();
            data.copy_from_slice(&config[usize::try_from(offset).unwrap()..][..data.len()]);
        } else {
            data.fill(0xb0 | u8::try_from(region).unwrap());
        }
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == CONFIG {
            let mut config = self.config.lock().unwrap();
            config[usize::try_from(offset).unwrap()..][..data.len()].copy_from_slice(data);
            self.did(Deed::WroteConfig(offset, data.to_vec()));
        } else {
            self.did(Deed::WroteBar(region, offset, data.to_vec()));
        }
        Ok(())
    }

    fn map(&self, _: u32, range: Range<u64>) -> io::Result<HostMemory> {
        let file = memfd_create("bar", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, range.end)?;
        HostMemory::map(&file, range.start, range.end - range.start)
    }

    fn interrupts(&self, kind: Interrupt) -> u32 {
        match kind {
            Interrupt::Intx => self.pin.into(),
            Interrupt::Msi => 4,
            Interrupt::Msix => VECTORS.into(),
            Interrupt::Error | Interrupt::Request => 1,
        }
    }

    fn signal(&self, kind: Interrupt, start: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        let there = eventfds.iter().map(Option::is_some).collect();
        for (number, eventfd) in (start..).zip(eventfds) {
            if let Some(eventfd) = eventfd {
                assert!(eventfd.as_raw_fd() > 0);
                self.eventfds.lock().unwrap().insert((kind, number), eventfd.try_clone()?);
            }
        }
        self.did(Deed::Signals(kind, start, there));
        Ok(())
    }

    fn disable(&self, kind: Interrupt) -> io::Result<()> {
        self.eventfds.lock().unwrap().retain(|(other, _), _| *other != kind);
        self.did(Deed::Disabled(kind));
        Ok(())
    }

    fn unmask_by(&self, _: &EventFd) -> io::Result<()> {
        if !self.unmasks_itself {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.did(Deed::UnmasksItself);
        Ok(())
    }

    fn unmask(&self) -> io::Result<()> {
        self.did(Deed::Unmasked);
        Ok(())
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        self.did(Deed::Reset);
        Ok(())
    }
}

/// A machine around a function: what it was asked for, as long as it is in use.
#[derive(Default)]
pub(super) struct World {
    /// What each vector becomes.
    pub(super) routes: Mutex<BTreeMap<u32, Option<Message>>>,
    vectors: AtomicU32,
    /// Where host memory is in the guest, and its length.
    pub(super) mapped: Mutex<BTreeMap<u64, u64>>,
    pub(super) failures: AtomicU32,
    pub(super) wishes: AtomicU32,
    pub(super) triggers: AtomicU32,
    /// What the last trigger is told by that the guest ended an interrupt.
    pub(super) ended: Mutex<Option<EventFd>>,
    this: Weak<Self>,
}

impl World {
    pub(super) fn new() -> Arc<Self> {
        Arc::new_cyclic(|this| Self { this: this.clone(), ..Self::default() })
    }

    fn this(&self) -> Arc<Self> {
        self.this.upgrade().unwrap()
    }

    /// A function of `fake` in this machine.
    pub(super) fn function(&self, fake: &Arc<Fake>) -> VfioFunction {
        let this = self.this();
        let machine = Machine { messages: this.clone(), direct: this.clone(), owner: this };
        VfioFunction::new("fake".into(), fake.clone(), machine).unwrap()
    }

    /// Whether nothing of it is in use.
    pub(super) fn is_empty(&self) -> bool {
        self.routes.lock().unwrap().is_empty()
            && self.mapped.lock().unwrap().is_empty()
            && self.triggers.load(Ordering::SeqCst) == 0
    }
}

impl Messages for World {
    fn send(&self, _: Message) {}

    fn vector(&self) -> io::Result<Box<dyn Vector>> {
        let number = self.vectors.fetch_add(1, Ordering::SeqCst);
        self.routes.lock().unwrap().insert(number, None);
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        Ok(Box::new(WorldVector { world: self.this(), number, eventfd }))
    }
}

struct WorldVector {
    world: Arc<World>,
    number: u32,
    eventfd: EventFd,
}

impl Vector for WorldVector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn route(&self, message: Option<Message>) -> io::Result<()> {
        self.world.routes.lock().unwrap().insert(self.number, message);
        Ok(())
    }
}

impl Drop for WorldVector {
    fn drop(&mut self) {
        self.world.routes.lock().unwrap().remove(&self.number);
    }
}

impl DirectMap for World {
    fn map(&self, at: u64, memory: &Arc<HostMemory>) -> io::Result<Box<dyn Mapped>> {
        let before = self.mapped.lock().unwrap().insert(at, memory.len());
        assert_eq!(before, None, "something else is there");
        Ok(Box::new(WorldSlot { world: self.this(), at }))
    }
}

struct WorldSlot {
    world: Arc<World>,
    at: u64,
}

impl Mapped for WorldSlot {}

impl Drop for WorldSlot {
    fn drop(&mut self) {
        self.world.mapped.lock().unwrap().remove(&self.at);
    }
}

impl Owner for World {
    fn device_failed(&self) {
        self.failures.fetch_add(1, Ordering::SeqCst);
    }

    fn device_wanted(&self) {
        self.wishes.fetch_add(1, Ordering::SeqCst);
    }
}

impl Line for World {
    fn set(&self, _: bool) {
        unreachable!("the eventfd sets it");
    }

    fn trigger(&self) -> io::Result<Box<dyn LevelTrigger>> {
        self.triggers.fetch_add(1, Ordering::SeqCst);
        let [eventfd, ended] = [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?];
        *self.ended.lock().unwrap() = Some(ended.try_clone()?);
        Ok(Box::new(WorldTrigger { world: self.this(), eventfd, ended }))
    }
}

struct WorldTrigger {
    world: Arc<World>,
    eventfd: EventFd,
    ended: EventFd,
}

impl LevelTrigger for WorldTrigger {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn ended(&self) -> &EventFd {
        &self.ended
    }
}

impl Drop for WorldTrigger {
    fn drop(&mut self) {
        self.world.triggers.fetch_sub(1, Ordering::SeqCst);
    }
}
