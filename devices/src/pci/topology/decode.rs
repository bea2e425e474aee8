//! Base address registers on the buses of the machine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::{Forwarding, Place, Topology};
use crate::bus::{Bus, BusDevice};
use crate::pci::{Bar, BarKind, PciFunction};

/// Whether all bridges before its function forward all of what `bar` decodes.
pub(super) fn passes(bar: &Bar, path: &[Forwarding]) -> bool {
    path.iter().all(|bridge| {
        let [memory, prefetchable] = &bridge.memory;
        let windows = match bar.kind {
            BarKind::Io => [&bridge.io, &None],
            BarKind::Memory32 | BarKind::Memory64 => [memory, prefetchable],
        };
        let Some(last) = bar.address.checked_add(bar.size - 1) else { return false };
        windows
            .into_iter()
            .flatten()
            .any(|window| window.contains(&bar.address) && window.contains(&last))
    })
}

/// A base address register that answers.
struct Placed {
    bar: Bar,
    function: Arc<dyn PciFunction>,
}

/// All base address registers that answer, and where they may.
pub(super) struct Decoder {
    pio: Weak<Bus>,
    mmio: Weak<Bus>,
    io_windows: Vec<Range<u64>>,
    memory_windows: Vec<Range<u64>>,
    placed: BTreeMap<(Place, u8), Placed>,
}

/// A register of a function that asks to answer.
pub(super) type Wish = (Place, Arc<dyn PciFunction>, Bar);

impl Decoder {
    pub(super) fn new(
        pio: Weak<Bus>,
        mmio: Weak<Bus>,
        io_windows: Vec<Range<u64>>,
        memory_windows: Vec<Range<u64>>,
    ) -> Self {
        Self { pio, mmio, io_windows, memory_windows, placed: BTreeMap::new() }
    }

    /// Lets those of `wanted` answer that can, in their order, and no other.
    pub(super) fn become_of(&mut self, wanted: Vec<Wish>, topology: &Weak<Topology>) {
        let granted = self.granted(wanted);
        let stays = |key: &(Place, u8), placed: &Placed| {
            granted.get(key).is_some_and(|(function, bar)| {
                same_range(bar, &placed.bar) && Arc::ptr_eq(function, &placed.function)
            })
        };
        let gone: Vec<_> = self.placed.extract_if(.., |key, placed| !stays(key, placed)).collect();
        // All go before any comes: one may take the place of another.
        for (_, Placed { bar, function }) in gone {
            if let Some(bus) = self.bus(bar.kind) {
                bus.remove(bar.address);
            }
            function.place_bar(bar.index, None);
        }
        for (key, (function, bar)) in granted {
            if self.placed.contains_key(&key) {
                continue;
            }
            let Some(bus) = self.bus(bar.kind) else { continue };
            let window = Window {
                topology: topology.clone(),
                place: key.0,
                function: Arc::clone(&function),
                bar: bar.index,
            };
            match bus.insert(bar.address, bar.size, Arc::new(window)) {
                Ok(()) => {
                    function.place_bar(bar.index, Some(bar.address));
                    self.placed.insert(key, Placed { bar, function });
                }
                Err(error) => tracing::debug!(%error, "a base address register cannot answer"),
            }
        }
    }

    /// The first of those that want the same addresses, if the host bridge leads there.
    fn granted(&self, wanted: Vec<Wish>) -> BTreeMap<(Place, u8), (Arc<dyn PciFunction>, Bar)> {
        let mut granted: BTreeMap<_, (_, Bar)> = BTreeMap::new();
        for (place, function, bar) in wanted {
            let windows = match bar.kind {
                BarKind::Io => &self.io_windows,
                BarKind::Memory32 | BarKind::Memory64 => &self.memory_windows,
            };
            let Some(last) = bar.address.checked_add(bar.size - 1) else { continue };
            let leads = windows.iter().any(|w| w.contains(&bar.address) && w.contains(&last));
            if leads && !granted.values().any(|(_, other)| overlap(other, &bar)) {
                granted.insert((place, bar.index), (function, bar));
            } else {
                tracing::debug!(?place, ?bar, "a base address register must not answer there");
            }
        }
        granted
    }

    fn bus(&self, kind: BarKind) -> Option<Arc<Bus>> {
        if kind == BarKind::Io { self.pio.upgrade() } else { self.mmio.upgrade() }
    }
}

fn same_range(one: &Bar, other: &Bar) -> bool {
    (one.kind, one.address, one.size) == (other.kind, other.address, other.size)
}

/// Whether two registers, neither of which passes the end of its address space, overlap.
fn overlap(one: &Bar, other: &Bar) -> bool {
    let io = |bar: &Bar| bar.kind == BarKind::Io;
    io(one) == io(other)
        && one.address <= other.address + (other.size - 1)
        && other.address <= one.address + (one.size - 1)
}

/// What stands on the bus for a base address register.
struct Window {
    topology: Weak<Topology>,
    place: Place,
    function: Arc<dyn PciFunction>,
    bar: u8,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.read_bar(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let effect = self.function.write_bar(self.bar, offset, data);
        if let Some(topology) = self.topology.upgrade() {
            topology.apply(self.place, effect);
        }
    }
}
