//! PCI: functions, their configuration space, and where they answer.

pub mod bar;
pub mod bridge;
pub mod capability;
#[cfg(test)]
mod fuzz;
pub mod host;
pub mod identity;
pub mod intx;
pub mod msi;
pub mod msix;
pub mod registers;
#[cfg(test)]
pub(crate) mod testing;
pub mod topology;

use std::fmt;
use std::sync::Arc;

use migration::state::Migratable;

use crate::irq::Line;

/// Where a function is: bus, device (0 to 31) and function (0 to 7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    /// The bus, as the guest numbered it.
    pub bus: u8,
    /// The device on its bus, 0 to 31.
    pub device: u8,
    /// The function of its device, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// What a write changed beyond the function's own registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// Where its base address registers answer, or whether it may master the bus.
    Decode,
    /// Which buses, windows and devices are behind it.
    Routing,
    /// As [`Routing`](Self::Routing); and the devices of the bus behind it, one bit for the number
    /// of each, go back to the state after power-on.
    Reset(u32),
}

/// What a base address register decodes (PCI 3.0, 6.2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next register as well.
    Memory64,
}

/// A base address register and what the guest made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which register, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// Bytes, a power of two.
    pub size: u64,
    /// Where the guest put it.
    pub address: u64,
    /// Whether the function's command register lets it answer.
    pub decoding: bool,
}

/// A function on a PCI bus.
///
/// Any vCPU may call at any time: a function locks its own registers. It never calls the topology:
/// what must happen beyond its registers it reports as an [`Effect`], and the topology acts when
/// the function's lock is gone.
/// What moves with the guest is its registers. Loaded, they take effect once the topology is
/// loaded as well.
pub trait PciFunction: Migratable + Send + Sync {
    /// Reads configuration space; `offset` and `data` lie within its 4096 bytes.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&self, offset: u16, data: &[u8]) -> Effect;
    /// The base address registers that it has, as the guest programmed them.
    fn bars(&self) -> Vec<Bar>;
    /// Reads what a base address register decodes; `data` comes filled with ones.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes what a base address register decodes.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) -> Effect;
    /// Where the register answers from now on: `None` where its function, a bridge above it, or
    /// something else at that address keeps it from answering.
    fn place_bar(&self, bar: u8, at: Option<u64>);
    /// Whether the bridges above let it master the bus; its own command register counts as well.
    fn allow_bus_master(&self, allowed: bool);
    /// Gives it the interrupt line that its pin is wired to.
    fn wire(&self, intx: Arc<dyn Line>);
    /// Puts it in the state after power-on.
    fn reset(&self);
}
