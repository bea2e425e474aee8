//! A virtual machine: everything in it, running or not, and its saved state.

mod alarm;
mod assemble;
mod assigned;
pub(crate) mod formats;
mod pci;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::bus::BusDevice;
use devices::legacy::pm::PmEvents;
use devices::legacy::rtc::Rtc;
use devices::legacy::serial::Serial;
use devices::shpc::Slots;
use migration::state::{Migratable, StateError, StateReader, StateWriter};

pub(crate) use alarm::Alarm;
pub(crate) use assemble::Error;
pub(crate) use assemble::HostSide;
pub(crate) use assigned::{Assigned, AssignedV1};

use crate::arch::clock::{self, ClockV1};
use crate::arch::irqchip::{self, IrqchipV1};
use crate::arch::vcpu::{Seen, VcpuV1};
use crate::config::{DeviceId, MachineConfig};
use crate::kvm::Vm;
use crate::power::PowerSwitch;
use crate::vcpu::{self, Exits, Vcpus};

/// A machine. Its vCPUs stand until [`Machine::resume`].
pub(crate) struct Machine {
    // Dropped first: the vCPUs' threads use all the others.
    vcpus: Arc<Vcpus>,
    devices: Parts,
    /// Where devices come and go; none without the bridge.
    slots: Option<Arc<Slots>>,
    /// The host's devices that it has.
    assigned: Assigned,
    vm: Arc<Vm>,
    config: MachineConfig,
    /// What this host could show of processors.
    shown: Seen,
    /// What the guest sees of its processors.
    seen: Seen,
    running: bool,
    exits: Arc<Exits>,
    host_ends: HostEnds,
    power: Arc<PowerSwitch>,
}

/// The slots of a machine, and whose device is in each.
#[derive(Clone)]
pub(crate) struct Seats {
    pub(crate) slots: Arc<Slots>,
    pub(crate) devices: BTreeMap<u8, DeviceId>,
}

/// The devices whose other end is turned to the host.
#[derive(Clone)]
pub(crate) struct HostEnds {
    /// Behind the console.
    pub(crate) com1: Arc<Serial>,
    /// Behind the host's clock.
    pub(crate) rtc: Arc<Rtc>,
    /// Behind the power button.
    pub(crate) pm: Arc<PmEvents>,
}

/// What moves with the guest.
trait Saves: Migratable + Send + Sync {}
impl<T: Migratable + Send + Sync> Saves for T {}

/// What moves with the guest besides vCPUs and KVM's devices, by address in the machine, such as
/// `pio/3f8`, in the order in which it is saved.
type Parts = Vec<(String, Arc<dyn Saves>)>;

/// What is on a machine's buses.
trait Device: BusDevice + Saves {}
impl<T: BusDevice + Saves> Device for T {}

impl Machine {
    pub(crate) fn config(&self) -> &MachineConfig {
        &self.config
    }

    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    pub(crate) fn vcpus(&self) -> &Arc<Vcpus> {
        &self.vcpus
    }

    /// What the guest sees of its processors.
    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// What this host could show of processors.
    pub(crate) fn shown(&self) -> &Seen {
        &self.shown
    }

    /// The model-specific registers of its vCPUs, and all bits that are set in any of them now.
    pub(crate) fn msrs(&self) -> Result<BTreeMap<u32, u64>, vcpu::Error> {
        let mut all = BTreeMap::new();
        for vcpu in self.vcpus.iter() {
            vcpu.msrs()?
                .into_iter()
                .for_each(|(index, value)| *all.entry(index).or_default() |= value);
        }
        Ok(all)
    }

    /// What is turned to the host.
    pub(crate) fn host_ends(&self) -> &HostEnds {
        &self.host_ends
    }

    /// Where devices come and go; none if the machine was given no slots.
    pub(crate) fn slots(&self) -> Option<&Arc<Slots>> {
        self.slots.as_ref()
    }

    /// Where its devices are; none if it was given no slots.
    pub(crate) fn seats(&self) -> Option<Seats> {
        let slots = self.slots.clone()?;
        let devices = self.assigned.ids().map(|id| (id.clone(), self.assigned.slot(id)));
        let devices = devices.filter_map(|(id, slot)| Some((slot?, id))).collect();
        Some(Seats { slots, devices })
    }

    /// The host's devices that it has.
    pub(crate) fn assigned(&self) -> &Assigned {
        &self.assigned
    }

    /// The same, to take note of those that come and go.
    pub(crate) fn assigned_mut(&mut self) -> &mut Assigned {
        &mut self.assigned
    }

    /// Where the guest's wish to be switched off goes.
    pub(crate) fn power(&self) -> &Arc<PowerSwitch> {
        &self.power
    }

    /// Whether the guest runs, as the user wished.
    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// Lets the guest run.
    pub(crate) fn resume(&mut self) -> Result<(), vcpu::Error> {
        self.vcpus.resume()?;
        self.running = true;
        Ok(())
    }

    /// Stops the guest between two instructions.
    pub(crate) fn pause(&mut self) -> Result<(), vcpu::Error> {
        self.vcpus.pause()?;
        self.running = false;
        Ok(())
    }

    /// How often the guest needed the VMM.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let Exits { pio, mmio } = &*self.exits;
        BTreeMap::from([
            ("exits-mmio".to_owned(), mmio.load(Ordering::Relaxed)),
            ("exits-pio".to_owned(), pio.load(Ordering::Relaxed)),
        ])
    }

    /// Saves everything but RAM. No vCPU may run.
    ///
    /// vCPUs first: what they did last is then in the other parts. The clock last.
    pub(crate) fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let state = vcpu.save().map_err(owner("save the vCPU"))?;
            out.at(format!("vcpu/{index}")).put(&state)?;
        }
        let irqchip = irqchip::save(self.vm.fd()).map_err(owner("save the irqchip"))?;
        out.at("irqchip").put(&irqchip)?;
        if let Some(slots) = &self.slots {
            self.assigned.save(slots, out)?;
        }
        for (address, device) in &self.devices {
            device.save(out.at(address.clone()))?;
        }
        let clock =
            clock::read(self.vm.fd(), self.shown.tsc_khz).map_err(owner("save the clock"))?;
        out.at("clock").put(&clock)
    }

    /// Becomes what was saved. No vCPU has run yet.
    pub(crate) fn load(&mut self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let mut tsc_offsets = Vec::new();
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let state: VcpuV1 = from.at(format!("vcpu/{index}")).take()?;
            let seen = state.seen(&self.shown.cpuid).map_err(owner("take the vCPU"))?;
            if index == 0 {
                self.seen = seen;
            }
            tsc_offsets.push(state.unscaled_tsc_offset(self.shown.tsc_khz));
            vcpu.load(state).map_err(owner("load the vCPU"))?;
        }
        let irqchip: IrqchipV1 = from.at("irqchip").take()?;
        irqchip::load(self.vm.fd(), &irqchip).map_err(owner("load the irqchip"))?;
        // Before the buses, which put into effect what the registers of all functions say.
        if let Some(slots) = &self.slots {
            self.assigned.load(slots, from)?;
        }
        for (address, device) in &self.devices {
            device.load(from.at(address.clone()))?;
        }
        let clock: ClockV1 = from.at("clock").take()?;
        self.load_clocks(&clock, &tsc_offsets).map_err(owner("load the clocks"))
    }

    /// Sets KVM's clock, and then the time-stamp counters to where they were beside it.
    fn load_clocks(&self, clock: &ClockV1, tsc_offsets: &[Option<u64>]) -> Result<(), vcpu::Error> {
        let here =
            clock::set(self.vm.fd(), clock, self.shown.tsc_khz).map_err(vcpu::Error::Clock)?;
        let Some(shift) = clock.shift(&here) else { return Ok(()) };
        for (vcpu, offset) in self.vcpus.iter().zip(tsc_offsets) {
            // Where one side cannot tell, the counters stay as they were loaded with the vCPU.
            if let Some(offset) = offset {
                vcpu.set_tsc_offset(offset.wrapping_add(shift))?;
            }
        }
        Ok(())
    }
}

fn owner<E>(what: &'static str) -> impl FnOnce(E) -> StateError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |error| StateError::owner(what, error)
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("config", &self.config).finish_non_exhaustive()
    }
}
