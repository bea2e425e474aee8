//! The chain of capabilities in configuration space (PCI 3.0, 6.7).

use super::registers::{CAPABILITIES, CONVENTIONAL, Registers, STATUS, status};

/// Capability identifiers (PCI Code and ID Assignment 1.11, 2).
pub mod id {
    /// Slot identification of a bridge with slots (PCI-to-PCI Bridge 1.2, 13.2).
    pub const SLOT_ID: u8 = 0x04;
    /// Message-signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Specific to the vendor.
    pub const VENDOR: u8 = 0x09;
    /// Standard hot-plug controller.
    pub const SHPC: u8 = 0x0c;
    /// Message-signalled interrupts with a table.
    pub const MSIX: u8 = 0x11;
}

/// The first byte after either header.
const FIRST: u16 = 0x40;
const NEXT: u16 = 1;

/// Builds the chain of an emulated function.
#[derive(Debug)]
pub struct Chain {
    /// Where the pointer to the next one lies.
    link: u16,
    free: u16,
}

impl Chain {
    /// A chain without a capability, right after the header.
    #[must_use]
    pub fn new() -> Self {
        Self { link: CAPABILITIES, free: FIRST }
    }

    /// Makes room for a capability of `length` bytes and links it; gives its offset.
    ///
    /// The body, from two bytes on, is for the caller to define.
    ///
    /// # Panics
    /// When configuration space is full: what a function has does not depend on any input.
    pub fn add(&mut self, registers: &mut Registers, id: u8, length: u16) -> u16 {
        let at = self.free;
        let end = usize::from(at) + usize::from(length);
        assert!(end <= CONVENTIONAL, "capabilities take more than configuration space");
        let pointer = u8::try_from(at).expect("it lies within 256 bytes");
        registers.constant(self.link, pointer);
        registers.constant(at, id);
        registers.constant(at + NEXT, 0_u8);
        let now: u16 = registers.get(STATUS);
        registers.preset(STATUS, now | status::CAPABILITIES);
        (self.link, self.free) = (at + NEXT, (at + length).next_multiple_of(4));
        at
    }
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

/// The capabilities in the chain that `read` shows, as identifier and offset.
///
/// A chain that was not built here, such as a device's own, may be a loop: it ends after as many
/// steps as there can be capabilities.
pub fn walk(read: impl Fn(u16) -> u8) -> Vec<(u8, u16)> {
    let mut found = Vec::new();
    let mut at = u16::from(read(CAPABILITIES) & !3);
    while at >= FIRST && found.len() < (CONVENTIONAL - usize::from(FIRST)) / 4 {
        found.push((read(at), at));
        at = u16::from(read(at + NEXT) & !3);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_found_in_the_order_in_which_they_were_added() {
        let mut registers = Registers::new(CONVENTIONAL);
        assert_eq!(walk(|at| registers.get(at)), []);
        let mut chain = Chain::new();
        let msi = chain.add(&mut registers, id::MSI, 14);
        let shpc = chain.add(&mut registers, id::SHPC, 8);
        assert_eq!((msi, shpc), (0x40, 0x50), "each starts at a multiple of four");
        assert_eq!(walk(|at| registers.get(at)), [(id::MSI, 0x40), (id::SHPC, 0x50)]);
        assert_eq!(registers.get::<u16>(STATUS), status::CAPABILITIES);
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let looped = |at| if at % 4 == NEXT || at == CAPABILITIES { 0x40 } else { 9 };
        assert_eq!(walk(looped).len(), 48);
        assert_eq!(walk(|_| 0xff).len(), 48);
    }
}
