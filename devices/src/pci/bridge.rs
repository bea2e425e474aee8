//! A PCI-to-PCI bridge whose secondary bus has hot-plug slots (PCI-to-PCI Bridge 1.2, SHPC 1.0).
//!
//! There is no firmware, so its bus numbers and windows are in place from power-on on: a guest that
//! finds them so leaves them alone, and they are wide enough for devices that come later.

mod header;
mod migration_block;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::bar::Layout;
use super::capability::{Chain, id};
use super::msi::Msi;
use super::registers::{COMMAND, CONVENTIONAL, Registers, RegistersV1, STATUS, command, status};
use super::topology::{Bridge, Forwarding};
use super::{Bar, BarKind, Effect, PciFunction};
use crate::irq::{Line, Messages};
use crate::shpc::{Controller, ControllerV1, FIRST_NUMBER, View};
pub use header::Windows;
use header::is_reset;
pub use migration_block::BlockView;
use migration_block::MigrationBlock;

/// Red Hat's identifier of a PCI-to-PCI bridge that no hardware has (QEMU's `pci-bridge`), so that
/// no driver thinks of the quirks of a real one.
pub const IDENTITY: (u16, u16) = (0x1b36, 0x0001);
/// Bytes of the base address register that holds the controller's working registers.
pub const REGISTERS_SIZE: u64 = 0x1000;
/// What the bridge is saved as.
pub const FORMAT: Format = Format::of::<SlotBridgeV1>();

/// SHPC capability (SHPC 1.0, 4.1.1): the selected double word of the working registers.
const SELECT: u16 = 2;
const DATA: u16 = 4;
const SHPC_LENGTH: u16 = 8;
/// Slot identification (PCI-to-PCI Bridge 1.2, 13.2): first in chassis, and how many slots.
const EXPANSION: u16 = 2;
const FIRST_IN_CHASSIS: u8 = 1 << 5;
const CHASSIS: u16 = 3;

/// Hears what the guest does to the slots.
///
/// Called on the thread of a vCPU, with no lock held, after the guest's write took effect.
pub trait SlotEvents: Send + Sync {
    /// The state, the lights or the card of `slot`, counted from 0, changed from `was` to `is`.
    fn changed(&self, slot: u8, was: View, is: View);
    /// The guest wrote to the migration block.
    fn told(&self);
}

struct State {
    registers: Registers,
    shpc: Controller,
    /// The message of the interrupt that stands has been sent: the controller's, and the block's.
    sent: [bool; 2],
    intx: Option<Arc<dyn Line>>,
}

/// A bridge with a hot-plug controller.
pub struct SlotBridge {
    msi: Msi,
    shpc_at: u16,
    block: MigrationBlock,
    bar: Layout,
    messages: Arc<dyn Messages>,
    events: OnceLock<Arc<dyn SlotEvents>>,
    state: Mutex<State>,
}

impl SlotBridge {
    /// A bridge with `slots` empty slots (1 to 31) and its working registers at `registers_at`,
    /// a multiple of [`REGISTERS_SIZE`] below 4 GiB.
    #[must_use]
    pub fn new(
        slots: u8,
        windows: &Windows,
        registers_at: u64,
        messages: Arc<dyn Messages>,
    ) -> Arc<Self> {
        let shpc = Controller::new(slots);
        let mut registers = Registers::new(CONVENTIONAL);
        header::define(&mut registers, IDENTITY, windows);
        let bar = Layout::new(0, BarKind::Memory32, false, REGISTERS_SIZE).expect("a page");
        bar.define(&mut registers, registers_at);

        let mut chain = Chain::new();
        let msi = Msi::new(0, 1, true, false);
        let msi = Msi::new(chain.add(&mut registers, id::MSI, msi.length()), 1, true, false);
        msi.define(&mut registers);
        let shpc_at = chain.add(&mut registers, id::SHPC, SHPC_LENGTH);
        registers.writable(shpc_at + SELECT, 0, 0xff_u8);
        let slot_id = chain.add(&mut registers, id::SLOT_ID, 4);
        registers.constant(slot_id + EXPANSION, shpc.slots() | FIRST_IN_CHASSIS);
        registers.writable(slot_id + CHASSIS, FIRST_NUMBER, 0xff_u8);
        let block = MigrationBlock::add(&mut chain, &mut registers, shpc.slots());

        let state = State { registers, shpc, sent: [false; 2], intx: None };
        let (events, state) = (OnceLock::new(), Mutex::new(state));
        Arc::new(Self { msi, shpc_at, block, bar, messages, events, state })
    }

    /// Names who hears of the slots; only the first to be named does.
    pub fn report_to(&self, events: Arc<dyn SlotEvents>) {
        // Whoever assembles a machine does this once.
        drop(self.events.set(events));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the controller.
    pub fn shpc<T>(&self, look: impl FnOnce(&Controller) -> T) -> T {
        look(&self.lock().shpc)
    }

    /// Acts on the controller from outside, as a hand at a slot does; the guest is interrupted if
    /// it wants to be. The topology is to be settled if the slot was on the bus.
    pub fn touch<T>(&self, act: impl FnOnce(&mut Controller) -> T) -> T {
        let mut state = self.lock();
        let result = act(&mut state.shpc);
        self.interrupt(&mut state);
        result
    }

    /// What host and guest wrote to the migration block.
    pub fn block(&self) -> BlockView {
        self.block.view(&self.lock().registers)
    }

    /// Tells the guest whether dirtying is wanted.
    pub fn want_dirtying(&self, wanted: bool) {
        self.want(|block, registers| block.want_dirtying(registers, wanted));
    }

    /// Asks the guest to pause `slots`, one bit for each, counted from 0.
    pub fn ask_to_pause(&self, slots: u32) {
        self.want(|block, registers| block.ask_to_pause(registers, slots));
    }

    /// Tells the guest that nothing needs to be paused any more.
    pub fn let_resume(&self) {
        self.want(MigrationBlock::let_resume);
    }

    fn want(&self, change: impl FnOnce(MigrationBlock, &mut Registers)) {
        let mut state = self.lock();
        change(self.block, &mut state.registers);
        self.interrupt(&mut state);
    }

    /// Makes the interrupt follow the registers.
    ///
    /// The line is a level. A message is sent each time that the controller or the block begins to
    /// want one, so that a driver which masks and unmasks again hears of what came in between,
    /// whatever the driver of the other is about.
    fn interrupt(&self, state: &mut State) {
        let State { registers, shpc, sent, intx } = state;
        let sources = [shpc.interrupts(), self.block.interrupts(registers)];
        let asserted = sources != [false; 2];
        let now: u16 = registers.get(STATUS);
        let flag = if asserted { status::INTERRUPT } else { 0 };
        registers.set(STATUS, now & !status::INTERRUPT | flag);
        let command: u16 = registers.get(COMMAND);
        let by_message = self.msi.is_enabled(registers);
        let may_send = by_message && command & command::MASTER != 0;
        for (wants, sent) in sources.into_iter().zip(sent) {
            if wants
                && may_send
                && !*sent
                && let Some(message) = self.msi.message(registers, 0)
            {
                self.messages.send(message);
            }
            *sent = wants && may_send;
        }
        if let Some(line) = intx {
            line.set(asserted && !by_message && command & command::INTX_DISABLE == 0);
        }
    }

    /// Lets the guest change the controller; says what that does to the devices behind.
    fn drive(&self, state: &mut State, change: impl FnOnce(&mut Controller)) -> Changes {
        let before = state.shpc.clone();
        change(&mut state.shpc);
        self.interrupt(state);
        let left = before.connected() & !state.shpc.connected();
        let effect = match left {
            0 if before.connected() == state.shpc.connected() => Effect::None,
            0 => Effect::Routing,
            // Without power, or isolated and held in reset, a device forgets everything.
            left => Effect::Reset(left),
        };
        let views = (0..before.slots()).filter_map(|slot| {
            let (was, is) = (before.view(slot)?, state.shpc.view(slot)?);
            (was != is).then_some((slot, was, is))
        });
        Changes { effect, views: views.collect(), told: false }
    }

    fn report(&self, changes: Changes) -> Effect {
        if let Some(events) = self.events.get() {
            for (slot, was, is) in changes.views {
                events.changed(slot, was, is);
            }
            if changes.told {
                events.told();
            }
        }
        changes.effect
    }

    /// The number of the double word of the working registers that configuration space shows.
    fn selected(&self, registers: &Registers) -> u64 {
        u64::from(registers.get::<u8>(self.shpc_at + SELECT))
    }

    /// The part of an access that is to the window on the working registers: the offset within the
    /// window, and which bytes of the access those are.
    fn data_window(&self, offset: u16, length: usize) -> Option<(u64, std::ops::Range<usize>)> {
        let (window, end) =
            (usize::from(self.shpc_at + DATA), usize::from(self.shpc_at + DATA) + 4);
        let (from, to) = (usize::from(offset), usize::from(offset) + length);
        let (first, last) = (from.max(window), to.min(end));
        (first < last).then(|| ((first - window) as u64, first - from..last - from))
    }
}

/// What a write changed.
struct Changes {
    effect: Effect,
    views: Vec<(u8, View, View)>,
    /// The guest wrote to the migration block.
    told: bool,
}

impl PciFunction for SlotBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        state.registers.read(offset, data);
        if let Some((at, bytes)) = self.data_window(offset, data.len()) {
            state.shpc.read(4 * self.selected(&state.registers) + at, &mut data[bytes]);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Effect {
        let mut state = self.lock();
        let before = state.registers.clone();
        state.registers.write(offset, data);
        let mut changes = match self.data_window(offset, data.len()) {
            Some((at, bytes)) => {
                // As in Linux, the selection is made before the data is written.
                let at = 4 * self.selected(&state.registers) + at;
                self.drive(&mut state, |shpc| shpc.write(at, &data[bytes]))
            }
            None => Changes { effect: Effect::None, views: Vec::new(), told: false },
        };
        let end =
            u16::try_from(data.len()).map_or(u16::MAX, |length| offset.saturating_add(length));
        changes.told = self.block.wrote(&mut state.registers, &(offset..end), &before);
        self.interrupt(&mut state);
        let (was, is) = (is_reset(&before), is_reset(&state.registers));
        if is && !was {
            changes.effect = Effect::Reset(u32::MAX);
        } else if changes.effect == Effect::None {
            changes.effect = header::effect(&before, &state.registers);
        }
        drop(state);
        self.report(changes)
    }

    fn bars(&self) -> Vec<Bar> {
        vec![self.bar.read(&self.lock().registers)]
    }

    fn read_bar(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.lock().shpc.read(offset, data);
    }

    fn write_bar(&self, _bar: u8, offset: u64, data: &[u8]) -> Effect {
        let mut state = self.lock();
        let changes = self.drive(&mut state, |shpc| shpc.write(offset, data));
        drop(state);
        self.report(changes)
    }

    fn place_bar(&self, _bar: u8, _at: Option<u64>) {}

    fn allow_bus_master(&self, _allowed: bool) {}

    fn wire(&self, intx: Arc<dyn Line>) {
        let mut state = self.lock();
        state.intx = Some(intx);
        self.interrupt(&mut state);
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.registers.reset();
        state.shpc.reset();
        self.interrupt(&mut state);
    }
}

impl Bridge for SlotBridge {
    fn forwarding(&self) -> Forwarding {
        let state = self.lock();
        let connected = if is_reset(&state.registers) { 0 } else { state.shpc.connected() };
        header::forwarding(&state.registers, connected)
    }
}

#[derive(Serialize, Deserialize)]
struct SlotBridgeV1 {
    registers: RegistersV1,
    controller: ControllerV1,
}

impl Saved for SlotBridgeV1 {
    const KIND: &'static str = "pci-slot-bridge";
    const VERSION: u16 = 1;
}

impl Migratable for SlotBridge {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let state = self.lock();
        // What stands at the interrupt is worked out anew.
        let State { registers, shpc, .. } = &*state;
        let saved = SlotBridgeV1 { registers: registers.save(), controller: shpc.save() };
        drop(state);
        out.put(&saved)
    }

    /// An interrupt that stood is sent again: once too often does no harm, never would.
    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let SlotBridgeV1 { registers, controller } = from.take()?;
        let mut state = self.lock();
        let (mut new_registers, mut shpc) = (state.registers.clone(), state.shpc.clone());
        new_registers.load(&registers).map_err(StateError::invalid::<SlotBridgeV1>)?;
        shpc.load(&controller).map_err(StateError::invalid::<SlotBridgeV1>)?;
        (state.registers, state.shpc, state.sent) = (new_registers, shpc, [false; 2]);
        self.interrupt(&mut state);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
