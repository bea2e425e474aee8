//! A machine on its way in.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::pci::identity::Identity;
use migration::compat::{Mismatch, Offer, Profile, Rule, Value, agree_in_terms};
use migration::guest::{Arriving, Host};
use migration::plan::StepFailure;
use migration::ram::{Ram, layout};
use migration::state::{StateError, StateReader};

use super::{Blueprint, DEVICES, Passenger, device_path, with_device};
use crate::arch::profile::{self, Platform, ProcessorTerms, TSC_KHZ};
use crate::cause;
use crate::config::{CPUS, CpuModel, DeviceConfig, MEMORY_MIN, MachineConfig, PCI_SLOTS};
use crate::machine::{HostSide, Machine, formats};

const CHOOSE_ANOTHER: &str = "mend that, or choose another host";
const SAME_UVMM: &str = "use the same uvmm on both sides";

/// Builds machines for guests that arrive.
pub(crate) struct Builder {
    host: HostSide,
    runs: Runs,
}

/// Whether a guest that arrives was let run, which its source may hear before anyone here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runs(Arc<AtomicBool>);

impl Runs {
    /// Whether it was.
    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Builder {
    pub(crate) fn new(host: HostSide) -> Self {
        Self { host, runs: Runs::default() }
    }

    /// What tells of the guests that it builds machines for.
    pub(crate) fn runs(&self) -> Runs {
        self.runs.clone()
    }

    /// This host's device for `passenger`.
    fn device(&self, passenger: &Passenger) -> Option<DeviceConfig> {
        let found = self.host.devices.iter().find(|device| device.id == passenger.id)?;
        Some(DeviceConfig { slot: Some(passenger.slot), ..found.clone() })
    }

    /// The devices that only one side brings.
    fn match_devices(&self, devices: &[Passenger], against: &mut Vec<Mismatch>) {
        for Passenger { id, .. } in devices.iter().filter(|device| self.device(device).is_none()) {
            let remedy = format!("start the destination with --device vfio,id={id},host=… as well");
            let path = device_path(id);
            against.push(mismatch(&path, "a device of this id", "none".into(), &remedy));
        }
        let surplus =
            |device: &&DeviceConfig| !devices.iter().any(|passenger| passenger.id == device.id);
        for DeviceConfig { id, host, .. } in self.host.devices.iter().filter(surplus) {
            let remedy = format!("leave the device {id} out at the destination");
            against.push(mismatch(&device_path(id), "none", host.to_string(), &remedy));
        }
    }

    /// Opens this host's device for each of the guest's; gives what they are.
    fn open_devices(
        &self,
        devices: &[Passenger],
        machine: &mut Machine,
        against: &mut Vec<Mismatch>,
    ) -> Profile {
        let mut have = Profile::new();
        for passenger in devices {
            let Some(device) = self.device(passenger) else { continue };
            let id = &passenger.id;
            match machine.assigned_mut().prepare(&device) {
                Ok(function) => {
                    have = with_device(have, id, Rule::Host, &Identity::of(&*function));
                }
                Err(error) => {
                    let remedy = format!("see 'uvmm doctor --device {}' there", device.host);
                    let found = cause::chain(&error);
                    against.push(mismatch(&device_path(id), "a device", found, &remedy));
                }
            }
        }
        have
    }

    /// The machine that was asked for, if this host can make it.
    fn build(
        &self,
        config: &MachineConfig,
        memory: Option<&[File]>,
        against: &mut Vec<Mismatch>,
    ) -> Option<Machine> {
        let here = match memory {
            Some(_) => Ok(()), // it is on this host already
            None => config.check_host(self.host.hugepages),
        };
        let told = |error| {
            let found = cause::chain(&error);
            mismatch("machine", &format!("{config:?}"), found, CHOOSE_ANOTHER)
        };
        let unfit = [config.check(), here].into_iter().filter_map(Result::err).map(told);
        let fits = against.len();
        against.extend(unfit);
        if against.len() > fits {
            return None;
        }
        let built = Machine::empty(config, &self.bare(), memory);
        let cannot =
            |error| mismatch("host", "a new machine", cause::chain(&error), CHOOSE_ANOTHER);
        built.map_err(|error| against.push(cannot(error))).ok()
    }

    /// This host without its devices: they come with a state, which tells which of them there are.
    fn bare(&self) -> HostSide {
        HostSide { devices: Vec::new(), ..self.host.clone() }
    }

    /// Compares what was offered with what this host has, by a machine that was made on it: that
    /// of the guest, or one that only stands for others.
    fn compare(
        &self,
        offer: &Offer,
        devices: Option<&[Passenger]>,
        machine: &mut Machine,
        is_its_own: bool,
        against: &mut Vec<Mismatch>,
    ) {
        let (host, built) = (machine.shown(), machine.seen());
        let have = match Platform::of_host(machine.vm(), host, built, guest_tsc_khz(offer)) {
            Ok(platform) => platform.profile(),
            Err(error) => {
                let found = cause::chain(&error);
                return against.push(mismatch("host", "its own features", found, SAME_UVMM));
            }
        };
        let opened = self.open_devices(devices.unwrap_or_default(), machine, against);
        let have = opened.items().iter().cloned().fold(have, Profile::with_item);
        let have = formats::read().fold(have, |have, format| format.read(have));
        // Of a device that could not be had, nothing else is told.
        let had = |path: &str| !against.iter().any(|m| path.starts_with(&format!("{}/", m.path)));
        let known = |path: &str| {
            (devices.is_some() || !path.starts_with(DEVICES))
                && (is_its_own || !profile::is_of_machine(path))
        };
        let items = |all: &Profile| {
            let kept = all.items().iter().filter(|item| had(&item.path) && known(&item.path));
            kept.cloned().fold(Profile::new(), Profile::with_item)
        };
        let compared = agree_in_terms(&items(&offer.profile), &items(&have), &ProcessorTerms);
        against.extend(compared.err().unwrap_or_default());
    }
}

/// What stands for a machine that could not be made, so that all else is told with it.
fn smallest() -> MachineConfig {
    let cpu = CpuModel::default();
    MachineConfig { memory: MEMORY_MIN, cpus: *CPUS.start(), pci_slots: *PCI_SLOTS.start(), cpu }
}

/// A machine that waits for its content.
#[derive(Debug)]
pub(crate) struct Awaiting {
    machine: Machine,
    blueprint: Blueprint,
    /// This host's devices for it.
    devices: Vec<DeviceConfig>,
    runs: Runs,
}

/// A guest that is here.
pub(crate) struct Settler {
    pub(crate) machine: Machine,
    /// Whether it is the built-in one.
    pub(crate) built_in: bool,
    /// Whether it bounces all DMA.
    pub(crate) bounces: bool,
    /// Its devices on this host, each with its slot; those that it was evicted from as well.
    pub(crate) devices: Vec<DeviceConfig>,
}

impl Awaiting {
    /// The machine with its guest in it.
    pub(crate) fn settle(self) -> Settler {
        let Self { machine, blueprint: Blueprint { built_in, bounces, .. }, devices, .. } = self;
        Settler { machine, built_in, bounces, devices }
    }
}

impl Host for Builder {
    type Guest = Awaiting;

    fn prepare(
        &mut self,
        offer: &Offer,
        memory: Option<Vec<File>>,
    ) -> Result<Awaiting, Vec<Mismatch>> {
        let mut against = Vec::new();
        let blueprint = Blueprint::decode(&offer.config)
            .map_err(|error| {
                let found = cause::chain(&error);
                against.push(mismatch("machine", "a machine", found, SAME_UVMM));
            })
            .ok();
        let devices = blueprint.as_ref().map(|blueprint| &blueprint.devices[..]);
        devices.inspect(|devices| self.match_devices(devices, &mut against));
        let config = blueprint.as_ref().map(|blueprint| &blueprint.machine);
        let own = config.and_then(|config| self.build(config, memory.as_deref(), &mut against));
        let Some(mut machine) = own else {
            if let Ok(mut machine) = Machine::empty(&smallest(), &self.bare(), None) {
                self.compare(offer, devices, &mut machine, false, &mut against);
            }
            return Err(against);
        };
        self.compare(offer, devices, &mut machine, true, &mut against);
        let ram = layout(machine.vm().ram());
        if ram != offer.ram {
            let (wanted, found) = (format!("{:x?}", offer.ram), format!("{ram:x?}"));
            against.push(mismatch("ram", &wanted, found, SAME_UVMM));
        }
        match blueprint {
            Some(blueprint) if against.is_empty() => {
                let devices = blueprint.devices.iter();
                let devices = devices.filter_map(|passenger| self.device(passenger)).collect();
                Ok(Awaiting { machine, blueprint, devices, runs: self.runs() })
            }
            _ => Err(against),
        }
    }
}

fn mismatch(path: &str, wanted: &str, found: String, remedy: &str) -> Mismatch {
    Mismatch { path: path.into(), wanted: wanted.into(), found, remedy: remedy.into() }
}

fn guest_tsc_khz(offer: &Offer) -> Option<u64> {
    offer.profile.items().iter().find(|item| item.path == TSC_KHZ).and_then(|item| {
        match item.value {
            Value::Number(khz) => Some(khz),
            _ => None,
        }
    })
}

impl Arriving for Awaiting {
    fn ram(&self) -> &Ram {
        self.machine.vm().ram()
    }

    fn load(&mut self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        self.machine.load(from)
    }

    fn run(&mut self) -> Result<(), StepFailure> {
        if let Some(slots) = self.machine.slots().filter(|_| !self.devices.is_empty()) {
            // Heard as soon as it runs: this ends what the source asked for.
            slots.let_resume();
            slots.want_dirtying(false);
        }
        // A guest can be quicker than whoever lets it run.
        self.runs.0.store(true, Ordering::Release);
        let resumed = if self.blueprint.running { self.machine.resume() } else { Ok(()) };
        self.runs.0.store(resumed.is_ok(), Ordering::Release);
        Ok(resumed?)
    }
}

#[cfg(test)]
mod tests;
