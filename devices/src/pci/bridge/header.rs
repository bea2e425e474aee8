//! The type 1 header (PCI-to-PCI Bridge 1.2, 3.2).

use std::ops::{Range, RangeInclusive};

use crate::pci::Effect;
use crate::pci::registers::{
    COMMAND, DEVICE_ID, Field, HEADER_TYPE, INTERRUPT_LINE, INTERRUPT_PIN, REVISION, Registers,
    STATUS, VENDOR_ID, command,
};
use crate::pci::topology::Forwarding;

const CLASS: u32 = 0x06_04_00 << 8;
const TYPE_1: u8 = 1;
const INTA: u8 = 1;

const CACHE_LINE: u16 = 0x0c;
const PRIMARY: u16 = 0x18;
const SECONDARY: u16 = 0x19;
const SUBORDINATE: u16 = 0x1a;
const SECONDARY_LATENCY: u16 = 0x1b;
const IO_BASE: u16 = 0x1c;
const IO_LIMIT: u16 = 0x1d;
const SECONDARY_STATUS: u16 = 0x1e;
const MEMORY_BASE: u16 = 0x20;
const MEMORY_LIMIT: u16 = 0x22;
const PREFETCHABLE_BASE: u16 = 0x24;
const PREFETCHABLE_LIMIT: u16 = 0x26;
const PREFETCHABLE_BASE_HIGH: u16 = 0x28;
const PREFETCHABLE_LIMIT_HIGH: u16 = 0x2c;
pub(super) const BRIDGE_CONTROL: u16 = 0x3e;

/// Resets everything on the secondary bus for as long as it is set (3.2.5.18).
pub(super) const SECONDARY_RESET: u16 = 1 << 6;
/// Parity, SERR#, ISA, master abort and reset: of these, only reset has an effect here.
const CONTROL_WRITABLE: u16 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5 | SECONDARY_RESET;
const ERRORS: u16 = 0xf900;
/// The low bits of base and limit that say the window is a 64-bit one (3.2.5.9).
const WIDE: u16 = 1;

/// The buses and windows behind a bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// The bus behind it, the only one.
    pub secondary: u8,
    /// I/O ports, in steps of 4 KiB, below 64 KiB; empty for none.
    pub io: Range<u64>,
    /// Memory below 4 GiB, in steps of 1 MiB; empty for none.
    pub memory: Range<u64>,
    /// Prefetchable memory anywhere, in steps of 1 MiB; empty for none.
    pub prefetchable: Range<u64>,
}

/// Defines the header.
pub(super) fn define(registers: &mut Registers, identity: (u16, u16), windows: &Windows) {
    registers.constant(VENDOR_ID, identity.0);
    registers.constant(DEVICE_ID, identity.1);
    let writable = command::IO
        | command::MEMORY
        | command::MASTER
        | command::PARITY
        | command::SERR
        | command::INTX_DISABLE;
    registers.writable(COMMAND, command::IO | command::MEMORY, writable);
    let status = Field { clearable: ERRORS, status: super::status::INTERRUPT, ..Field::default() };
    registers.define(STATUS, status);
    registers.constant(REVISION, CLASS);
    registers.writable(CACHE_LINE, 0, 0xff_u8);
    registers.constant(HEADER_TYPE, TYPE_1);
    registers.writable(PRIMARY, 0, 0xff_u8);
    registers.writable(SECONDARY, windows.secondary, 0xff);
    registers.writable(SUBORDINATE, windows.secondary, 0xff);
    registers.constant(SECONDARY_LATENCY, 0_u8);
    registers.define(SECONDARY_STATUS, Field { clearable: ERRORS, ..Field::default() });

    // An empty window has its limit below its base.
    let ends = |range: &Range<u64>, step: u64| match range.is_empty() {
        true => (u64::MAX, 0),
        false => (range.start / step, (range.end - 1) / step),
    };
    let (base, limit) = ends(&windows.io, 1 << 12);
    registers.writable(IO_BASE, bits(base << 4), 0xf0);
    registers.writable(IO_LIMIT, bits(limit << 4), 0xf0);
    let (base, limit) = ends(&windows.memory, 1 << 20);
    registers.writable(MEMORY_BASE, half(base << 4), 0xfff0);
    registers.writable(MEMORY_LIMIT, half(limit << 4), 0xfff0);
    let (base, limit) = ends(&windows.prefetchable, 1 << 20);
    registers.writable(PREFETCHABLE_BASE, half(base << 4) | WIDE, 0xfff0);
    registers.writable(PREFETCHABLE_LIMIT, half(limit << 4) | WIDE, 0xfff0);
    registers.writable(PREFETCHABLE_BASE_HIGH, word(base >> 12), !0);
    registers.writable(PREFETCHABLE_LIMIT_HIGH, word(limit >> 12), !0);

    registers.writable(INTERRUPT_LINE, 0, 0xff_u8);
    registers.constant(INTERRUPT_PIN, INTA);
    registers.writable(BRIDGE_CONTROL, 0, CONTROL_WRITABLE);
}

fn bits(value: u64) -> u8 {
    value.to_le_bytes()[0] & 0xf0
}

fn half(value: u64) -> u16 {
    let [b0, b1, ..] = value.to_le_bytes();
    u16::from_le_bytes([b0, b1]) & 0xfff0
}

fn word(value: u64) -> u32 {
    let [b0, b1, b2, b3, ..] = value.to_le_bytes();
    u32::from_le_bytes([b0, b1, b2, b3])
}

/// Whether the secondary bus is held in reset.
pub(super) fn is_reset(registers: &Registers) -> bool {
    registers.get::<u16>(BRIDGE_CONTROL) & SECONDARY_RESET != 0
}

/// What the bridge lets through, with the devices in `connected` behind it.
pub(super) fn forwarding(registers: &Registers, connected: u32) -> Forwarding {
    let command: u16 = registers.get(COMMAND);
    let window = |enable: u16, base: u64, last: u64| -> Option<RangeInclusive<u64>> {
        (command & enable != 0 && base <= last).then_some(base..=last)
    };
    let at = |offset| u64::from(registers.get::<u16>(offset) & 0xfff0) << 16;
    let high = |offset| u64::from(registers.get::<u32>(offset)) << 32;
    let port = |offset| u64::from(registers.get::<u8>(offset) & 0xf0) << 8;
    let memory = window(command::MEMORY, at(MEMORY_BASE), at(MEMORY_LIMIT) | 0xf_ffff);
    let prefetchable = window(
        command::MEMORY,
        high(PREFETCHABLE_BASE_HIGH) | at(PREFETCHABLE_BASE),
        high(PREFETCHABLE_LIMIT_HIGH) | at(PREFETCHABLE_LIMIT) | 0xf_ffff,
    );
    Forwarding {
        secondary: registers.get(SECONDARY),
        subordinate: registers.get(SUBORDINATE),
        io: window(command::IO, port(IO_BASE), port(IO_LIMIT) | 0xfff),
        memory: [memory, prefetchable],
        master: command & command::MASTER != 0,
        connected,
    }
}

/// What it means to others that `before` became `after`.
pub(super) fn effect(before: &Registers, after: &Registers) -> Effect {
    let differs = |range: Range<u16>| {
        range.step_by(4).any(|at| before.get::<u32>(at) != after.get::<u32>(at))
    };
    let command = |registers: &Registers| registers.get::<u16>(COMMAND);
    let base_address = differs(0x10..0x14);
    let forwards = differs(PRIMARY..0x30) || is_reset(before) != is_reset(after);
    if forwards || command(before) != command(after) {
        Effect::Routing
    } else if base_address {
        Effect::Decode
    } else {
        Effect::None
    }
}
