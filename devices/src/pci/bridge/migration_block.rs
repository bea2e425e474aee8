//! The migration block: by it host and guest agree on what becomes of the devices behind a bridge
//! while the guest moves. A vendor-specific capability (PCI 3.0, appendix H), as there is no
//! standard for it.
//!
//! | offset | access | content |
//! |---|---|---|
//! | +0x00 | ro | identifier 0x09, next, length 0x20, revision 1 |
//! | +0x04 | ro | signature, the letters `uvmm` |
//! | +0x08 | ro | capabilities: 0 dirtying, 1 pause |
//! | +0x0c | ro, w1c | status: 0 dirtying wanted, 1 pause wanted, 2 promise broken, 31 event (w1c) |
//! | +0x10 | rw | control: 0 dirtying promised, 1 can pause, 2 dirtying, 31 interrupt enable |
//! | +0x14 | ro | slots asked to pause |
//! | +0x18 | rw | slots paused |
//! | +0x1c | rw | slots that could not be paused |
//!
//! Bit i of the last three stands for slot i, counted from 0: device i + 1 of the bus behind.
//!
//! The host sets *event* whenever it changed what it wants. It interrupts only while the guest has
//! *interrupt enable* set: a guest without a driver for the block would never clear the event, and
//! its interrupt line, which others share, would never rest. A driver clears *event* first and
//! reads what is wanted then, so that nothing is missed.
//!
//! - *Dirtying promised*: as long as dirtying is wanted, whatever page a device behind the bridge
//!   wrote is written by a CPU as well, at the latest when the pause is answered. The guest sets
//!   *dirtying* once it began to, and clears it when it is wanted no more. A guest that can keep its
//!   promise no longer clears both bits at once. *Promise broken* tells of that until dirtying is
//!   wanted anew: a host that relied on it looks at the end.
//! - *Pause*: the host sets the slots asked, clears both answers, and sets *pause wanted*. The guest
//!   pauses their devices, in reverse order, and writes both answers: a pause is answered when
//!   each slot that was asked is in one of them.
//! - *Resume*: the host clears *pause wanted*. The guest resumes whatever it paused and writes zero
//!   to *slots paused*, which clears the slots asked: until then it is not done.
//!
//! A reset clears both what the guest wrote and what the host wanted: a guest that starts anew has
//! paused nothing and knows of nothing.

use std::ops::Range;

use crate::pci::capability::{Chain, id};
use crate::pci::registers::{Field, Registers};

const LENGTH: u16 = 0x20;
const REVISION: u8 = 1;
const SIGNATURE: u32 = u32::from_le_bytes(*b"uvmm");

// Where the registers lie in the capability.
const LENGTH_AT: u16 = 0x02;
const REVISION_AT: u16 = 0x03;
const SIGNATURE_AT: u16 = 0x04;
const CAPABILITIES: u16 = 0x08;
const STATUS: u16 = 0x0c;
const CONTROL: u16 = 0x10;
const ASKED: u16 = 0x14;
const PAUSED: u16 = 0x18;
const UNABLE: u16 = 0x1c;

const DIRTYING: u32 = 1 << 0;
const PAUSE: u32 = 1 << 1;
const TOUCHING: u32 = 1 << 2;
const BROKEN: u32 = 1 << 2;
const INTERRUPT_ENABLE: u32 = 1 << 31;
const EVENT: u32 = 1 << 31;

/// What host and guest wrote. Slots are bits, counted from 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockView {
    /// The guest promises to write, with a CPU, whatever page a device behind the bridge wrote
    /// while dirtying is wanted.
    pub dirtying_active: bool,
    /// The guest can pause every device behind the bridge.
    pub can_pause: bool,
    /// The guest keeps its promise since before it said so: what devices write from now on, a CPU
    /// writes as well.
    pub dirtying_began: bool,
    /// The guest took its promise back while dirtying was wanted, if only for a moment.
    pub broken: bool,
    /// The host wants dirtying.
    pub wants_dirtying: bool,
    /// The host wants the slots in `asked` paused.
    pub wants_pause: bool,
    /// The slots asked to pause, until the guest says after a resume that none is paused.
    pub asked: u32,
    /// The slots that the guest paused.
    pub paused: u32,
    /// The slots that the guest could not pause.
    pub unable: u32,
}

impl BlockView {
    /// Whether a CPU has written whatever a device wrote since dirtying began.
    #[must_use]
    pub fn promise_is_kept(&self) -> bool {
        self.wants_dirtying && self.dirtying_active && self.dirtying_began && !self.broken
    }

    /// Whether the guest has said of each slot asked what became of it.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.asked & !(self.paused | self.unable) == 0
    }

    /// Whether nothing is wanted paused, and the guest has said that nothing is.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        !self.wants_pause && self.asked == 0 && self.paused == 0
    }
}

/// Where the block of a bridge lies; its content is in the bridge's [`Registers`].
#[derive(Debug, Clone, Copy)]
pub(super) struct MigrationBlock(u16);

impl MigrationBlock {
    /// Adds the block of a bridge with `slots` slots to its capabilities.
    pub(super) fn add(chain: &mut Chain, registers: &mut Registers, slots: u8) -> Self {
        let at = chain.add(registers, id::VENDOR, LENGTH);
        let slots = !(u32::MAX.checked_shl(slots.into()).unwrap_or(0));
        registers.constant(at + LENGTH_AT, LENGTH.to_le_bytes()[0]);
        registers.constant(at + REVISION_AT, REVISION);
        registers.constant(at + SIGNATURE_AT, SIGNATURE);
        registers.constant(at + CAPABILITIES, DIRTYING | PAUSE);
        let status =
            Field { status: DIRTYING | PAUSE | BROKEN, clearable: EVENT, ..Field::default() };
        registers.define(at + STATUS, status);
        registers.writable(at + CONTROL, 0, DIRTYING | PAUSE | TOUCHING | INTERRUPT_ENABLE);
        registers.define(at + ASKED, Field { status: slots, ..Field::default() });
        registers.writable(at + PAUSED, 0, slots);
        registers.writable(at + UNABLE, 0, slots);
        Self(at)
    }

    fn get(self, registers: &Registers, register: u16) -> u32 {
        registers.get(self.0 + register)
    }

    /// What both sides wrote.
    pub(super) fn view(self, registers: &Registers) -> BlockView {
        let [status, control] = [STATUS, CONTROL].map(|at| self.get(registers, at));
        BlockView {
            dirtying_active: control & DIRTYING != 0,
            can_pause: control & PAUSE != 0,
            dirtying_began: control & TOUCHING != 0,
            broken: status & BROKEN != 0,
            wants_dirtying: status & DIRTYING != 0,
            wants_pause: status & PAUSE != 0,
            asked: self.get(registers, ASKED),
            paused: self.get(registers, PAUSED),
            unable: self.get(registers, UNABLE),
        }
    }

    /// Whether it asserts the bridge's interrupt.
    pub(super) fn interrupts(self, registers: &Registers) -> bool {
        let [status, control] = [STATUS, CONTROL].map(|at| self.get(registers, at));
        status & EVENT != 0 && control & INTERRUPT_ENABLE != 0
    }

    /// Changes what the host wants, and tells the guest so.
    fn want(self, registers: &mut Registers, what: u32, wanted: bool) {
        let status = self.get(registers, STATUS) & !what;
        registers.set(self.0 + STATUS, status | EVENT | if wanted { what } else { 0 });
    }

    pub(super) fn want_dirtying(self, registers: &mut Registers, wanted: bool) {
        self.want(registers, BROKEN, false);
        self.want(registers, DIRTYING, wanted);
    }

    /// Asks the guest to pause `slots`; what it answered before is forgotten.
    pub(super) fn ask_to_pause(self, registers: &mut Registers, slots: u32) {
        registers.set(self.0 + PAUSED, 0_u32);
        registers.set(self.0 + UNABLE, 0_u32);
        registers.set(self.0 + ASKED, slots);
        self.want(registers, PAUSE, true);
    }

    pub(super) fn let_resume(self, registers: &mut Registers) {
        self.want(registers, PAUSE, false);
    }

    /// Takes notice of a write of the guest to `written` of configuration space, which was as in
    /// `before`; whether it was here.
    pub(super) fn wrote(
        self,
        registers: &mut Registers,
        written: &Range<u16>,
        before: &Registers,
    ) -> bool {
        let kept = |registers| self.view(registers).promise_is_kept();
        if kept(before) && !kept(registers) {
            let status = self.get(registers, STATUS);
            registers.set(self.0 + STATUS, status | BROKEN);
        }
        let within =
            |from: u16, to: u16| written.start < self.0 + to && self.0 + from < written.end;
        let BlockView { wants_pause, paused, .. } = self.view(registers);
        if within(PAUSED, PAUSED + 4) && !wants_pause && paused == 0 {
            registers.set(self.0 + ASKED, 0_u32);
        }
        within(0, LENGTH)
    }
}

#[cfg(test)]
mod tests;
