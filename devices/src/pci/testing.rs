//! What the tests of the buses share: a machine with a bridge, and a card that remembers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use migration::state::{Migratable, StateError, StateReader, StateWriter};

use super::bar::Layout;
use super::bridge::{SlotBridge, Windows};
use super::host::HostBridge;
use super::registers::{COMMAND, CONVENTIONAL, INTERRUPT_PIN, Registers, command};
use super::topology::{BusId, Place, ROOT, Surroundings, Topology};
use super::{Bar, BarKind, Effect, PciFunction};
use crate::bus::Bus;
use crate::irq::{Line, Message, Messages, Vector};
use crate::legacy::testing::{Wire, wire};

pub(crate) const MEMORY: u64 = 0xc000_0000;
pub(crate) const PREFETCHABLE: u64 = 0x4_0000_0000;
pub(crate) const WORKING_REGISTERS: u64 = 0xd000_0000;

/// Remembers every message.
#[derive(Default)]
pub(crate) struct Post(Mutex<Vec<Message>>);

impl Post {
    pub(crate) fn take(&self) -> Vec<Message> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Messages for Post {
    fn send(&self, message: Message) {
        self.0.lock().unwrap().push(message);
    }

    fn vector(&self) -> std::io::Result<Box<dyn Vector>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// What became of a card.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Diary {
    pub(crate) placed: BTreeMap<u8, u64>,
    pub(crate) master: bool,
    pub(crate) resets: u32,
}

/// A function with 16 KiB of prefetchable memory, 4 KiB of other memory, and 16 ports.
pub(crate) struct Card {
    bars: [Layout; 3],
    registers: Mutex<Registers>,
    diary: Mutex<Diary>,
    intx: Mutex<Option<Arc<dyn Line>>>,
}

impl Card {
    pub(crate) fn new() -> Arc<Self> {
        let bars = [
            Layout::new(0, BarKind::Memory64, true, 0x4000).unwrap(),
            Layout::new(2, BarKind::Memory32, false, 0x1000).unwrap(),
            Layout::new(3, BarKind::Io, false, 0x10).unwrap(),
        ];
        let mut registers = Registers::new(CONVENTIONAL);
        registers.constant(0, 0x1234_5678_u32);
        registers.writable(COMMAND, 0, command::IO | command::MEMORY | command::MASTER);
        registers.constant(INTERRUPT_PIN, 1_u8);
        bars.iter().for_each(|bar| bar.define(&mut registers, 0));
        let (diary, intx) = (Mutex::default(), Mutex::default());
        Arc::new(Self { bars, registers: Mutex::new(registers), diary, intx })
    }

    pub(crate) fn diary(&self) -> Diary {
        self.diary.lock().unwrap().clone()
    }

    pub(crate) fn assert_intx(&self) {
        self.intx.lock().unwrap().as_ref().unwrap().set(true);
    }
}

impl Migratable for Card {
    fn save(&self, _: &mut StateWriter) -> Result<(), StateError> {
        Ok(())
    }

    fn load(&self, _: &mut StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl PciFunction for Card {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.registers.lock().unwrap().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Effect {
        self.registers.lock().unwrap().write(offset, data);
        Effect::Decode
    }

    fn bars(&self) -> Vec<Bar> {
        let registers = self.registers.lock().unwrap();
        self.bars.iter().map(|bar| bar.read(&registers)).collect()
    }

    fn read_bar(&self, bar: u8, _: u64, data: &mut [u8]) {
        data.fill(0xa0 | bar);
    }

    fn write_bar(&self, _: u8, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }

    fn place_bar(&self, bar: u8, at: Option<u64>) {
        let mut diary = self.diary.lock().unwrap();
        match at {
            Some(at) => {
                assert_eq!(diary.placed.insert(bar, at), None, "it was not taken away before");
            }
            None => assert!(diary.placed.remove(&bar).is_some(), "it was not there"),
        }
    }

    fn allow_bus_master(&self, allowed: bool) {
        self.diary.lock().unwrap().master = allowed;
    }

    fn wire(&self, intx: Arc<dyn Line>) {
        *self.intx.lock().unwrap() = Some(intx);
    }

    fn reset(&self) {
        self.registers.lock().unwrap().reset();
        self.diary.lock().unwrap().resets += 1;
    }
}

/// A machine with a host bridge and a bridge of four slots at 00:01.0.
pub(crate) struct Board {
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) bridge: Arc<SlotBridge>,
    pub(crate) behind: BusId,
    pub(crate) post: Arc<Post>,
    pub(crate) lines: Vec<Arc<Wire>>,
}

/// Configuration address of the bridge: bus, then device and function.
pub(crate) const BRIDGE: (u8, u8) = (0, 1 << 3);
/// That of the first slot's card.
pub(crate) const SLOT_1: (u8, u8) = (1, 1 << 3);

impl Board {
    pub(crate) fn new() -> Self {
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let lines: Vec<_> = (0..8).map(|_| wire()).collect();
        let topology = Topology::new(Surroundings {
            pio: Arc::downgrade(&pio),
            mmio: Arc::downgrade(&mmio),
            io_windows: vec![0x1000..0x8000, 0x8000..0x1_0000],
            memory_windows: vec![MEMORY..0xe000_0000, PREFETCHABLE..2 * PREFETCHABLE],
            lines: lines.iter().map(|line| Arc::clone(line) as Arc<dyn Line>).collect(),
        });
        let post = Arc::new(Post::default());
        let windows = Windows {
            secondary: 1,
            io: 0xc000..0xd000,
            memory: MEMORY..WORKING_REGISTERS,
            prefetchable: PREFETCHABLE..2 * PREFETCHABLE,
        };
        let bridge = SlotBridge::new(4, &windows, WORKING_REGISTERS, post.clone());
        topology.insert(Place::new(ROOT, 0, 0), Arc::new(HostBridge::new())).unwrap();
        let behind = topology.insert_bridge(Place::new(ROOT, 1, 0), bridge.clone()).unwrap();
        Self { pio, mmio, topology, bridge, behind, post, lines }
    }

    /// Puts a card into the first slot, as if it had always been there.
    pub(crate) fn cold(&self) -> Arc<Card> {
        let card = Card::new();
        self.topology.insert(Place::new(self.behind, 1, 0), card.clone()).unwrap();
        self.bridge.touch(|shpc| shpc.insert_cold(0));
        self.topology.settle();
        card
    }

    pub(crate) fn read<const N: usize>(&self, (bus, devfn): (u8, u8), offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.topology.read_config(bus, devfn, offset, &mut data);
        data
    }

    pub(crate) fn write(&self, (bus, devfn): (u8, u8), offset: u16, data: &[u8]) {
        self.topology.write_config(bus, devfn, offset, data);
    }

    /// Writes a working register of the hot-plug controller.
    pub(crate) fn drive(&self, register: u64, data: &[u8]) {
        assert!(self.mmio.write(WORKING_REGISTERS + register, data), "nobody answers");
    }

    /// Gives the controller a command for the first slot.
    pub(crate) fn command(&self, code: u8) {
        self.drive(0x14, &[code, 1]);
    }

    /// Lets the guest map the card in the first slot as a driver would.
    pub(crate) fn start_card(&self) {
        self.write(BRIDGE, COMMAND, &[7, 0]);
        self.write(SLOT_1, 0x10, &(PREFETCHABLE + 0x4000).to_le_bytes());
        self.write(SLOT_1, 0x18, &0xc010_0000_u32.to_le_bytes());
        self.write(SLOT_1, 0x1c, &0xc040_u32.to_le_bytes());
        self.write(SLOT_1, COMMAND, &[7, 0]);
    }
}
