//! A device of the host as a function on the guest's PCI bus.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::attention::{Owner, listen_for};
use super::container::Container;
use super::error::Error;
use super::hardware::{CONFIG, Hardware, Interrupt, VfioHardware};
use super::host::HostDevice;
use super::interrupts::Interrupts;
use super::listener::Listener;
use super::patch::{self, Patched};
use super::regions::Window;
use crate::direct::DirectMap;
use crate::irq::{Line, Messages};
use crate::pci::bar::{COUNT, Layout};
use crate::pci::msi::Msi;
use crate::pci::msix::{Capability, Control, Msix, MsixV1};
use crate::pci::registers::{COMMAND, INTERRUPT_PIN, Registers, RegistersV1, command};
use crate::pci::{Bar, Effect, PciFunction};

/// What a device of the host is saved as.
pub const FORMAT: Format = Format::of::<VfioFunctionV1>();

/// What a device needs of the machine that it is put into.
#[derive(Clone)]
pub struct Machine {
    /// Where its message-signalled interrupts go.
    pub messages: Arc<dyn Messages>,
    /// Where its memory goes.
    pub direct: Arc<dyn DirectMap>,
    /// Who hears what the host has to say of it.
    pub owner: Arc<dyn Owner>,
}

/// A device of the host on the guest's PCI bus. Dropped, it is reset and the host's again.
pub struct VfioFunction {
    name: String,
    // Dropped before the device: it listens to it.
    _attention: Option<Listener>,
    direct: Arc<dyn DirectMap>,
    bars: Vec<Layout>,
    msi: Option<Msi>,
    msix: Option<Capability>,
    through: Vec<bool>,
    resets: Vec<(u16, u8)>,
    state: Mutex<State>,
    hardware: Arc<dyn Hardware>,
}

struct State {
    registers: Registers,
    table: Option<Msix>,
    interrupts: Interrupts,
    /// By base address register.
    windows: Vec<(u8, Window)>,
    line: Option<Arc<dyn Line>>,
    /// Whether the bridges above let it master the bus.
    master: bool,
}

impl VfioFunction {
    /// Opens the device at `path` in sysfs, and guest memory to it.
    ///
    /// # Errors
    /// What stands in the way, and what to do about it.
    pub fn open(path: &Path, container: &Container, machine: Machine) -> Result<Arc<Self>, Error> {
        let host = HostDevice::find(path)
            .map_err(|source| Error::Missing { path: path.to_owned(), source })?;
        host.check()?;
        let (device, reach) = container.open(&host)?;
        let hardware = Arc::new(VfioHardware::new(device, reach));
        Self::new(host.name, hardware, machine).map(Arc::new)
    }

    pub(super) fn new(
        name: String,
        hardware: Arc<dyn Hardware>,
        machine: Machine,
    ) -> Result<Self, Error> {
        let config = |source| Error::Config { name: name.clone(), source };
        let original = patch::read_all(&*hardware).map_err(config)?;
        let patched = patch::patch(&*hardware, &original)
            .map_err(|why| Error::Unfit { name: name.clone(), why })?;
        let Patched { registers, through, bars, msi, msix, resets } = patched;
        let kept = |bar: u8| kept(msix.as_ref(), bar);
        let windows = (0..COUNT)
            .filter(|bar| hardware.region(u32::from(*bar)).size > 0)
            .map(|bar| (bar, Window::open(&*hardware, bar.into(), &kept(bar))));
        let state = State {
            registers,
            table: msix.map(|capability| Msix::new(capability.vectors)),
            interrupts: Interrupts::new(hardware.clone(), machine.messages),
            windows: windows.collect(),
            line: None,
            master: false,
        };
        let attention = listen_for(&*hardware, machine.owner)
            .inspect_err(|error| tracing::warn!(name, %error, "nobody listens for the device"))
            .ok();
        let function = Self {
            name,
            _attention: attention,
            direct: machine.direct,
            bars,
            msi,
            msix,
            through,
            resets,
            state: Mutex::new(state),
            hardware,
        };
        function.command(&function.lock());
        Ok(function)
    }

    /// What the host calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the device a command register.
    ///
    /// It always answers: where the guest reaches it is up to the buses, and nobody reaches it
    /// through a mapping at a moment when it does not answer, which the kernel would not forgive.
    fn command(&self, state: &State) {
        let guest: u16 = state.registers.get(COMMAND);
        let master = if state.master { command::MASTER } else { 0 };
        let value = command::IO | command::MEMORY | guest & (master | command::INTX_DISABLE);
        self.told(
            "its command register",
            self.hardware.write(CONFIG, COMMAND.into(), &value.to_le_bytes()),
        );
    }

    fn told(&self, what: &str, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(device = self.name, what, %error, "VFIO refuses an access");
        }
    }

    /// The runs of bytes from `offset` on that are the device's, cut as they can be accessed at
    /// once, as indices into an access of `len` bytes.
    fn runs(&self, offset: u16, len: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for index in 0..len {
            let at = usize::from(offset) + index;
            if !self.through.get(at).copied().unwrap_or(false) {
                continue;
            }
            match runs.last_mut() {
                // As long as it stays within one double word, and begins where it can.
                Some(run) if run.end == index && at % 4 != 0 => run.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }

    /// Whether the write resets the function. The device itself is not told.
    fn takes_reset(&self, offset: u16, data: &mut [u8]) -> bool {
        let mut found = false;
        for (at, bit) in &self.resets {
            let index = at.checked_sub(offset).map(usize::from);
            if let Some(byte) = index.and_then(|index| data.get_mut(index)) {
                found |= *byte & bit != 0;
                *byte &= !bit;
            }
        }
        found && self.hardware.can_reset()
    }

    /// Power-on: of the device as of what is ours.
    fn restart(&self, state: &mut State) {
        state.interrupts.off();
        state.registers.reset();
        if let Some(table) = &mut state.table {
            table.reset();
        }
        if self.hardware.can_reset() {
            self.told("a reset", self.hardware.reset());
        }
        self.command(state);
        self.choose_interrupts(state);
    }

    /// Interrupts as the guest's registers say: by table, by message, or else by the pin.
    fn choose_interrupts(&self, state: &mut State) {
        let State { registers, table, interrupts, line, .. } = state;
        if let (Some(capability), Some(table)) = (&self.msix, table) {
            let control = capability.control(registers);
            let changed = table.set_control(control);
            if control.enabled {
                interrupts.by_messages(Interrupt::Msix, table.vectors().into());
                for vector in changed {
                    interrupts.route(vector, table.message(vector));
                }
                return;
            }
        }
        match &self.msi {
            Some(msi) if msi.is_enabled(registers) => {
                interrupts.by_messages(Interrupt::Msi, msi.enabled_vectors(registers).into());
                for vector in 0..msi.enabled_vectors(registers) {
                    interrupts.route(vector.into(), msi.message(registers, vector));
                }
            }
            _ if registers.get::<u8>(INTERRUPT_PIN) == 0 => interrupts.off(),
            _ => interrupts.pin(line.as_deref()),
        }
    }

    /// Where in the interrupt table, or in its pending bits, an access falls.
    fn in_table(&self, bar: u8, offset: u64) -> Option<Table> {
        let [table, pending] = self.msix.as_ref().map(places)?;
        let within = |(place, range): (u8, Range<u64>)| {
            (place == bar && range.contains(&offset)).then(|| offset - range.start)
        };
        within(table).map(Table::Entries).or_else(|| within(pending).map(Table::Pending))
    }
}

/// A place in an interrupt table.
enum Table {
    Entries(u64),
    Pending(u64),
}

/// Where the table and the pending bits are.
fn places(capability: &Capability) -> [(u8, Range<u64>); 2] {
    let table = Msix::new(capability.vectors);
    let range = |offset: u32, size| u64::from(offset)..u64::from(offset) + size;
    [
        (capability.table.bar, range(capability.table.offset, table.table_size())),
        (capability.pending.bar, range(capability.pending.offset, table.pending_size())),
    ]
}

/// What of a base address register is not the device's.
fn kept(capability: Option<&Capability>, bar: u8) -> Vec<Range<u64>> {
    let all = capability.map(places).into_iter().flatten();
    all.filter(|(place, _)| *place == bar).map(|(_, range)| range).collect()
}

/// Whether an access of `len` bytes at `offset` touches `register`.
fn touches(offset: u16, len: usize, register: Range<usize>) -> bool {
    usize::from(offset) < register.end && register.start < usize::from(offset) + len
}

const COMMAND_BYTES: Range<usize> = 4..6;
const BAR_BYTES: Range<usize> = 0x10..0x28;

impl PciFunction for VfioFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().registers.read(offset, data);
        for run in self.runs(offset, data.len()) {
            let at = u64::from(offset) + run.start as u64;
            self.told("reading", self.hardware.read(CONFIG, at, &mut data[run]));
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Effect {
        let mut data = data.to_vec();
        let mut state = self.lock();
        if self.takes_reset(offset, &mut data) {
            self.restart(&mut state);
            return Effect::Decode;
        }
        let before: u16 = state.registers.get(COMMAND);
        state.registers.write(offset, &data);
        if state.registers.get::<u16>(COMMAND) != before {
            self.command(&state);
        }
        self.choose_interrupts(&mut state);
        drop(state);
        for run in self.runs(offset, data.len()) {
            let at = u64::from(offset) + run.start as u64;
            self.told("writing", self.hardware.write(CONFIG, at, &data[run]));
        }
        let decodes = [COMMAND_BYTES, BAR_BYTES].map(|part| touches(offset, data.len(), part));
        if decodes.contains(&true) { Effect::Decode } else { Effect::None }
    }

    fn bars(&self) -> Vec<Bar> {
        let state = self.lock();
        self.bars.iter().map(|bar| bar.read(&state.registers)).collect()
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let place = self.in_table(bar, offset);
        let Some(place) = place else {
            return self.told("reading", self.hardware.read(bar.into(), offset, data));
        };
        let mut state = self.lock();
        let State { table, interrupts, .. } = &mut *state;
        let Some(table) = table else { return };
        match place {
            Table::Entries(at) => table.read_table(at, data),
            Table::Pending(at) => {
                for vector in 0..table.vectors() {
                    let held = table.message(vector).is_none() && table.control().enabled;
                    table.set_pending(vector, held && interrupts.is_pending(vector));
                }
                table.read_pending(at, data);
            }
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) -> Effect {
        match self.in_table(bar, offset) {
            None => self.told("writing", self.hardware.write(bar.into(), offset, data)),
            Some(Table::Pending(_)) => {}
            Some(Table::Entries(at)) => {
                let mut state = self.lock();
                let State { table: Some(table), interrupts, .. } = &mut *state else {
                    return Effect::None;
                };
                let before: Vec<_> = (0..table.vectors()).map(|v| table.message(v)).collect();
                for vector in table.write_table(at, data) {
                    let message = table.message(vector);
                    if before[usize::from(vector)] != message {
                        interrupts.route(vector, message);
                    }
                }
            }
        }
        Effect::None
    }

    fn place_bar(&self, bar: u8, at: Option<u64>) {
        let mut state = self.lock();
        if let Some((_, window)) = state.windows.iter_mut().find(|(index, _)| *index == bar) {
            window.place(&*self.direct, at);
        }
    }

    fn allow_bus_master(&self, allowed: bool) {
        let mut state = self.lock();
        state.master = allowed;
        self.command(&state);
    }

    fn wire(&self, intx: Arc<dyn Line>) {
        let mut state = self.lock();
        // A former line is let go of.
        state.interrupts.off();
        state.line = Some(intx);
        self.choose_interrupts(&mut state);
    }

    fn reset(&self) {
        let mut state = self.lock();
        self.restart(&mut state);
    }
}

/// What is ours of it. What is the device's own stays behind: the guest's driver builds it anew.
#[derive(Serialize, Deserialize)]
struct VfioFunctionV1 {
    registers: RegistersV1,
    table: Option<MsixV1>,
}

impl Saved for VfioFunctionV1 {
    const KIND: &'static str = "vfio-function";
    const VERSION: u16 = 1;
}

impl Migratable for VfioFunction {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let State { registers, table, .. } = &*self.lock();
        out.put(&VfioFunctionV1 {
            registers: registers.save(),
            table: table.as_ref().map(Msix::save),
        })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let VfioFunctionV1 { registers, table } = from.take()?;
        let invalid = StateError::invalid::<VfioFunctionV1>;
        let mut state = self.lock();
        let (mut new_registers, mut new_table) = (state.registers.clone(), state.table.clone());
        new_registers.load(&registers).map_err(invalid)?;
        match (&mut new_table, table) {
            (Some(own), Some(saved)) => {
                own.load(saved).map_err(invalid)?;
                // Not yet: it is switched on as the registers say, which routes its vectors.
                own.set_control(Control::default());
            }
            (None, None) => {}
            _ => return Err(invalid("only one of the two devices has an interrupt table")),
        }
        state.interrupts.off();
        (state.registers, state.table) = (new_registers, new_table);
        self.command(&state);
        self.choose_interrupts(&mut state);
        Ok(())
    }
}
