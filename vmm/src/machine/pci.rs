//! The PCI buses of a machine: the host bridge, the bridge with the slots, and the ways there.

use std::ops::Range;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice};
use devices::irq::{Line, Messages};
use devices::pci::bridge::{SlotBridge, Windows};
use devices::pci::host::{ConfigPorts, Ecam, HostBridge};
use devices::pci::topology::{Place, PlaceError, ROOT, Surroundings, Topology};
use devices::shpc::Slots;

use super::Parts;
use crate::arch::layout;

/// Where the bridge with the slots is.
const SLOT_BRIDGE: u8 = 1;

/// What a machine has of PCI.
pub(super) struct Pci {
    pub(super) ports: Arc<ConfigPorts>,
    pub(super) ecam: Arc<Ecam>,
    /// None without the bridge.
    pub(super) slots: Option<Arc<Slots>>,
    /// What moves with the guest, by its address; the topology last, as it acts on all others.
    pub(super) saved: Parts,
}

/// What PCI needs of the machine around it.
pub(super) struct Around<'a> {
    pub(super) pio: &'a Arc<Bus>,
    pub(super) mmio: &'a Arc<Bus>,
    /// The lines that interrupt pins are wired to in turn.
    pub(super) lines: Vec<Arc<dyn Line>>,
    pub(super) messages: Arc<dyn Messages>,
    /// The memory above RAM, if there is room.
    pub(super) memory_64: Option<Range<u64>>,
    /// What answers in the midst of the configuration ports.
    pub(super) reset: Arc<dyn BusDevice>,
}

impl Pci {
    /// Buses with `slots` empty slots, behind a bridge if there are any.
    pub(super) fn new(slots: u8, around: Around<'_>) -> Result<Self, PlaceError> {
        let Around { pio, mmio, lines, messages, memory_64, reset } = around;
        let memory_windows = [Some(layout::PCI_MEMORY), memory_64.clone()];
        let topology = Topology::new(Surroundings {
            pio: Arc::downgrade(pio),
            mmio: Arc::downgrade(mmio),
            io_windows: Vec::from([layout::PCI_IO]),
            memory_windows: memory_windows.into_iter().flatten().collect(),
            lines,
        });
        let host = Arc::new(HostBridge::new());
        topology.insert(Place::new(ROOT, 0, 0), host.clone())?;
        let ports = Arc::new(ConfigPorts::new(topology.clone(), reset));
        let ecam = Arc::new(Ecam::new(topology.clone()));
        let mut saved: Parts =
            vec![("pio/cf8".to_owned(), ports.clone()), ("pci/00:00.0".to_owned(), host)];
        let mut bridged = None;
        if slots > 0 {
            let windows = Windows {
                secondary: layout::SLOT_BUS,
                io: layout::SLOT_IO,
                memory: layout::SLOT_MEMORY,
                prefetchable: layout::slot_memory_64(memory_64),
            };
            let bridge = SlotBridge::new(slots, &windows, layout::SLOT_REGISTERS, messages);
            let behind =
                topology.insert_bridge(Place::new(ROOT, SLOT_BRIDGE, 0), bridge.clone())?;
            saved.push(("pci/00:01.0".to_owned(), bridge.clone()));
            bridged = Some(Slots::new(topology.clone(), bridge, behind));
        }
        saved.push(("pci".to_owned(), topology));
        Ok(Self { ports, ecam, slots: bridged, saved })
    }
}
