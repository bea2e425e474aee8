//! Devices that become whatever they are told that they are.

use std::io;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice};
use devices::irq::{Line, Message, Messages, Vector};
use devices::legacy::Power;
use devices::legacy::pm::{PmControl, PmEvents};
use devices::legacy::reset::ResetControl;
use devices::legacy::rtc::Rtc;
use devices::legacy::serial::Serial;
use devices::pci::bridge::{SlotBridge, Windows};
use devices::pci::host::{ConfigPorts, HostBridge};
use devices::pci::topology::{Place, ROOT, Surroundings, Topology};
use migration::state::testing::{load, saved};
use migration::state::{Migratable, StateReader};

struct Nothing;

impl Line for Nothing {
    fn set(&self, _: bool) {}
}

impl Power for Nothing {
    fn off(&self) {}
    fn reset(&self) {}
}

impl Messages for Nothing {
    fn send(&self, _: Message) {}
    fn vector(&self) -> io::Result<Box<dyn Vector>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl BusDevice for Nothing {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

/// The first byte chooses a device, the rest is its state; as a whole it is a state, too.
pub(crate) fn states(data: &[u8]) {
    if let Ok(reader) = StateReader::open(data) {
        let _unread = reader.finish();
    }
    let Some((which, payload)) = data.split_first() else { return };
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let topology = topology(&pio, &mmio);
    let line = || Arc::new(Nothing);
    match which % 9 {
        0 => become_it(&Serial::new(line(), Box::new(io::sink()), || {}), payload),
        1 => become_it(&Rtc::new(line(), || {}), payload),
        2 => become_it(&PmEvents::new(line()), payload),
        3 => become_it(&PmControl::new(line()), payload),
        4 => become_it(&ResetControl::new(line()), payload),
        5 => become_it(&HostBridge::new(), payload),
        6 => become_it(&ConfigPorts::new(topology, line()), payload),
        7 => become_it(&*topology, payload),
        _ => become_it(&*bridge(), payload),
    }
}

fn topology(pio: &Arc<Bus>, mmio: &Arc<Bus>) -> Arc<Topology> {
    let topology = Topology::new(Surroundings {
        pio: Arc::downgrade(pio),
        mmio: Arc::downgrade(mmio),
        io_windows: vec![0x1000..0x8000, 0x8000..0x1_0000],
        memory_windows: vec![0xc000_0000..0xd000_0000, 0xd000_0000..0xe000_0000],
        lines: vec![Arc::new(Nothing)],
    });
    topology.insert(Place::new(ROOT, 0, 0), Arc::new(HostBridge::new())).expect("it is empty");
    topology.insert_bridge(Place::new(ROOT, 1, 0), bridge()).expect("there is room");
    topology
}

fn bridge() -> Arc<SlotBridge> {
    let windows = Windows {
        secondary: 1,
        io: 0xc000..0xd000,
        memory: 0xc000_0000..0xc100_0000,
        prefetchable: 1 << 32..2 << 32,
    };
    SlotBridge::new(4, &windows, 0xc100_0000, Arc::new(Nothing))
}

/// A load that refuses leaves the device as it was; one that does not makes it what was said.
fn become_it(device: &impl Migratable, payload: &[u8]) {
    let before = saved(device);
    if load(device, &with_payload(&before, payload)).is_ok() {
        let after = saved(device);
        load(device, &after).expect("a device takes its own state");
        assert_eq!(saved(device), after, "a device differs from what it says it is");
    } else {
        assert_eq!(saved(device), before, "a refused load changed the device");
    }
}

/// The first section of `state` with another payload, as the module of states documents it.
fn with_payload(state: &[u8], payload: &[u8]) -> Vec<u8> {
    let names = usize::from(state[0]) + usize::from(state[1]);
    let mut section = state[..8 + names].to_vec();
    let length = u32::try_from(payload.len()).expect("scripts are small");
    section[4..8].copy_from_slice(&length.to_le_bytes());
    section.extend(payload);
    let sum = crc32fast::hash(&section);
    section.extend(sum.to_le_bytes());
    section
}

fn payload(state: &[u8]) -> &[u8] {
    let names = usize::from(state[0]) + usize::from(state[1]);
    &state[8 + names..state.len() - 4]
}

/// A state of each device as it is built.
pub(super) fn valid() -> Vec<Vec<u8>> {
    let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let topology = topology(&pio, &mmio);
    let line = || Arc::new(Nothing);
    let states = [
        saved(&Serial::new(line(), Box::new(io::sink()), || {})),
        saved(&Rtc::new(line(), || {})),
        saved(&PmEvents::new(line())),
        saved(&PmControl::new(line())),
        saved(&ResetControl::new(line())),
        saved(&HostBridge::new()),
        saved(&ConfigPorts::new(topology.clone(), line())),
        saved(&*topology),
        saved(&*bridge()),
    ];
    let number = |(which, state): (u8, &Vec<u8>)| [&[which], payload(state)].concat();
    (0..).zip(&states).map(number).chain(states.clone()).collect()
}
