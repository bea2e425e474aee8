//! Which functions there are, which of them an access reaches, and where their base address
//! registers answer.
//!
//! What a guest programs is a wish. [`Topology`] grants it as far as bridges and command registers
//! let accesses through, as the address lies in a window of the host bridge, and as nothing else
//! answers there; of two registers at one address the one of the lower function wins. It works all
//! of that out anew at each [`Effect`], so that the outcome depends on the registers alone and not
//! on the way that led there.

mod decode;

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::intx::{SharedLine, root_line, swizzle};
use super::registers::INTERRUPT_PIN;
use super::{Bdf, Effect, PciFunction};
use crate::bus::Bus;
use crate::irq::Line;
use decode::Decoder;

/// What a bridge lets through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarding {
    /// The bus right behind it; 0 while the guest gave it none.
    pub secondary: u8,
    /// The last bus behind it.
    pub subordinate: u8,
    /// Which I/O ports.
    pub io: Option<RangeInclusive<u64>>,
    /// Which memory, by its two windows.
    pub memory: [Option<RangeInclusive<u64>>; 2],
    /// Whether what is behind may master the bus.
    pub master: bool,
    /// The devices behind it that are on the bus, one bit for the number of each.
    pub connected: u32,
}

/// A bridge to another PCI bus.
pub trait Bridge: PciFunction {
    /// What it lets through at the moment.
    fn forwarding(&self) -> Forwarding;
}

/// A bus by what it is wired to, whatever number the guest gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BusId(u8);

/// The bus of the host bridge.
pub const ROOT: BusId = BusId(0);
/// What the places of functions is saved as.
pub const FORMAT: Format = Format::of::<TopologyV1>();

/// Where a function is wired: the bus, and device and function as in configuration addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The bus.
    pub bus: BusId,
    /// Device in the upper five bits, function in the lower three.
    pub devfn: u8,
}

impl Place {
    /// `function` (0 to 7) of `device` (0 to 31) on `bus`.
    #[must_use]
    pub fn new(bus: BusId, device: u8, function: u8) -> Self {
        Self { bus, devfn: (device & 31) << 3 | function & 7 }
    }

    fn device(self) -> u8 {
        self.devfn >> 3
    }
}

/// Why a function cannot be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Another one is there.
    #[error("there is a PCI function at that place already")]
    Taken,
    /// There is no such bus, or there are as many as can be.
    #[error("there is no such PCI bus")]
    NoBus,
}

struct Occupant {
    function: Arc<dyn PciFunction>,
    /// What it was told last of mastering the bus.
    master: bool,
}

struct Segment {
    /// The bridge before it; the root has none.
    bridge: Option<(Place, Arc<dyn Bridge>)>,
}

struct State {
    segments: BTreeMap<BusId, Segment>,
    functions: BTreeMap<Place, Occupant>,
    decoder: Decoder,
}

/// Where things are in the machine that the host bridge leads into.
pub struct Surroundings {
    /// The address space of ports.
    pub pio: Weak<Bus>,
    /// The address space of memory-mapped devices.
    pub mmio: Weak<Bus>,
    /// The ports that base address registers may decode.
    pub io_windows: Vec<Range<u64>>,
    /// The memory that they may decode: no RAM, and nothing else of the machine.
    pub memory_windows: Vec<Range<u64>>,
    /// The interrupt lines that pins are wired to in turn, at least one.
    pub lines: Vec<Arc<dyn Line>>,
}

/// The PCI buses of a machine.
pub struct Topology {
    this: Weak<Self>,
    lines: Vec<Arc<SharedLine>>,
    state: Mutex<State>,
}

impl Topology {
    /// A root bus without functions.
    #[must_use]
    pub fn new(surroundings: Surroundings) -> Arc<Self> {
        let Surroundings { pio, mmio, io_windows, memory_windows, lines } = surroundings;
        let state = State {
            segments: BTreeMap::from([(ROOT, Segment { bridge: None })]),
            functions: BTreeMap::new(),
            decoder: Decoder::new(pio, mmio, io_windows, memory_windows),
        };
        let lines = lines.into_iter().map(SharedLine::new).collect();
        Arc::new_cyclic(|this| Self { this: this.clone(), lines, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wires `function` in at `place`.
    ///
    /// # Errors
    /// When the place is not there or taken.
    pub fn insert(&self, place: Place, function: Arc<dyn PciFunction>) -> Result<(), PlaceError> {
        let mut state = self.lock();
        if !state.segments.contains_key(&place.bus) {
            return Err(PlaceError::NoBus);
        }
        if state.functions.contains_key(&place) {
            return Err(PlaceError::Taken);
        }
        if let Some(line) = self.line(&state, place, &*function) {
            function.wire(line);
        }
        function.allow_bus_master(false);
        state.functions.insert(place, Occupant { function, master: false });
        state.settle(&self.this);
        Ok(())
    }

    /// Wires `bridge` in at `place`; gives the bus behind it.
    ///
    /// # Errors
    /// As [`Topology::insert`].
    pub fn insert_bridge(
        &self,
        place: Place,
        bridge: Arc<dyn Bridge>,
    ) -> Result<BusId, PlaceError> {
        let last = self.lock().segments.keys().next_back().map_or(0, |bus| bus.0);
        let bus = BusId(last.checked_add(1).ok_or(PlaceError::NoBus)?);
        self.insert(place, bridge.clone())?;
        self.lock().segments.insert(bus, Segment { bridge: Some((place, bridge)) });
        Ok(bus)
    }

    /// Takes the function at `place` out, and everything of it off the buses of the machine.
    ///
    /// For one that is no bridge. An access that began before may still be running.
    pub fn remove(&self, place: Place) -> Option<Arc<dyn PciFunction>> {
        let mut state = self.lock();
        let occupant = state.functions.remove(&place)?;
        state.settle(&self.this);
        drop(state);
        occupant.function.allow_bus_master(false);
        Some(occupant.function)
    }

    /// The function at `place`.
    #[must_use]
    pub fn get(&self, place: Place) -> Option<Arc<dyn PciFunction>> {
        self.lock().functions.get(&place).map(|occupant| Arc::clone(&occupant.function))
    }

    /// The address by which the guest reaches `place` at the moment.
    #[must_use]
    pub fn address(&self, place: Place) -> Option<Bdf> {
        let state = self.lock();
        let bus = match &state.segments.get(&place.bus)?.bridge {
            None => 0,
            Some((_, bridge)) => bridge.forwarding().secondary,
        };
        (place.bus == ROOT || bus != 0).then_some(Bdf {
            bus,
            device: place.device(),
            function: place.devfn & 7,
        })
    }

    /// Works everything out anew, after registers changed in another way than by the guest.
    pub fn settle(&self) {
        self.lock().settle(&self.this);
    }

    /// Reads configuration space for the guest; all ones where no function answers.
    ///
    /// `offset` and `data` lie within 4096 bytes.
    pub fn read_config(&self, bus: u8, devfn: u8, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let found = self.lock().route(bus, devfn);
        if let Some((_, function)) = found {
            function.read_config(offset, data);
        }
    }

    /// Writes configuration space for the guest; nothing happens where no function answers.
    pub fn write_config(&self, bus: u8, devfn: u8, offset: u16, data: &[u8]) {
        let found = self.lock().route(bus, devfn);
        if let Some((place, function)) = found {
            let effect = function.write_config(offset, data);
            self.apply(place, effect);
        }
    }

    /// Does what a write to the function at `place` had as its effect. No lock may be held.
    fn apply(&self, place: Place, effect: Effect) {
        let mut state = self.lock();
        match effect {
            Effect::None => return,
            Effect::Decode | Effect::Routing => {}
            Effect::Reset(devices) => state.reset_behind(place, devices),
        }
        state.settle(&self.this);
    }

    /// The line that the function's interrupt pin is wired to.
    fn line(
        &self,
        state: &State,
        place: Place,
        function: &dyn PciFunction,
    ) -> Option<Arc<dyn Line>> {
        let mut pin = [0];
        function.read_config(INTERRUPT_PIN, &mut pin);
        let (mut pin, mut place) = (pin[0].checked_sub(1)?, place);
        while let Some((bridge, _)) = &state.segments.get(&place.bus)?.bridge {
            (pin, place) = (swizzle(place.device(), pin), *bridge);
        }
        let lines = u8::try_from(self.lines.len()).unwrap_or(u8::MAX).max(1);
        let line = self.lines.get(usize::from(root_line(place.device(), pin, lines)))?;
        Some(line.source())
    }
}

impl State {
    /// The bus behind the bridge at `place`.
    fn behind(&self, place: Place) -> Option<(BusId, &Arc<dyn Bridge>)> {
        self.segments.iter().find_map(|(bus, segment)| match &segment.bridge {
            Some((at, bridge)) if *at == place => Some((*bus, bridge)),
            _ => None,
        })
    }

    /// The function that a configuration access reaches (PCI-to-PCI Bridge 1.2, 3.1).
    fn route(&self, number: u8, devfn: u8) -> Option<(Place, Arc<dyn PciFunction>)> {
        let mut bus = ROOT;
        if number != 0 {
            loop {
                let (next, forwarding) = self.segments.iter().find_map(|(id, segment)| {
                    let (place, bridge) = segment.bridge.as_ref().filter(|(p, _)| p.bus == bus)?;
                    self.functions.get(place)?;
                    let forwarding = bridge.forwarding();
                    let behind = forwarding.secondary..=forwarding.subordinate;
                    let leads = forwarding.secondary != 0 && behind.contains(&number);
                    leads.then_some((*id, forwarding))
                })?;
                // Buses get their numbers in the order in which they are wired: this ends.
                bus = next;
                if forwarding.secondary == number {
                    let connected = forwarding.connected >> (devfn >> 3) & 1 != 0;
                    if !connected {
                        return None;
                    }
                    break;
                }
            }
        }
        let place = Place { bus, devfn };
        Some((place, Arc::clone(&self.functions.get(&place)?.function)))
    }

    /// Puts the `devices` behind the bridge at `place`, and all behind those, in the state after
    /// power-on.
    fn reset_behind(&mut self, place: Place, devices: u32) {
        let Some((bus, _)) = self.behind(place) else { return };
        let hit: Vec<_> = self
            .functions
            .iter()
            .filter(|(place, _)| place.bus == bus && devices >> place.device() & 1 != 0)
            .map(|(place, occupant)| (*place, Arc::clone(&occupant.function)))
            .collect();
        for (place, function) in hit {
            function.reset();
            self.reset_behind(place, u32::MAX);
        }
    }

    /// The bridges before `bus`, and whether each lets the one before it or `device` through.
    fn path(&self, place: Place) -> Option<Vec<Forwarding>> {
        let (mut path, mut place) = (Vec::new(), place);
        while let Some((at, bridge)) = &self.segments.get(&place.bus)?.bridge {
            let forwarding = bridge.forwarding();
            if forwarding.connected >> place.device() & 1 == 0 {
                return None;
            }
            path.push(forwarding);
            place = *at;
        }
        Some(path)
    }

    /// Grants what the functions' registers ask for, and takes back what they no longer do.
    fn settle(&mut self, topology: &Weak<Topology>) {
        let paths: Vec<_> = self.functions.keys().map(|place| self.path(*place)).collect();
        let mut wanted = Vec::new();
        for ((place, occupant), path) in self.functions.iter_mut().zip(&paths) {
            let master = path.as_ref().is_some_and(|path| path.iter().all(|bridge| bridge.master));
            if occupant.master != master {
                occupant.master = master;
                occupant.function.allow_bus_master(master);
            }
            let Some(path) = path else { continue };
            for bar in occupant.function.bars() {
                if bar.decoding && decode::passes(&bar, path) {
                    wanted.push((*place, Arc::clone(&occupant.function), bar));
                }
            }
        }
        self.decoder.become_of(wanted, topology);
    }
}

/// Which functions there are: what a guest that arrives must find.
#[derive(Serialize, Deserialize)]
struct TopologyV1 {
    functions: Vec<Place>,
}

impl Saved for TopologyV1 {
    const KIND: &'static str = "pci-topology";
    const VERSION: u16 = 1;
}

impl Migratable for Topology {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let functions = self.lock().functions.keys().copied().collect();
        out.put(&TopologyV1 { functions })
    }

    /// To be loaded after its functions: their registers then take effect.
    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let TopologyV1 { functions } = from.take()?;
        let mut state = self.lock();
        if !state.functions.keys().eq(functions.iter()) {
            return Err(StateError::invalid::<TopologyV1>("there are other PCI functions here"));
        }
        state.settle(&self.this);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
