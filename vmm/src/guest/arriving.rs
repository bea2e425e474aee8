//! A machine on its way in.

use std::fs::File;

use devices::pci::identity::Identity;
use migration::compat::{Mismatch, Offer, Profile, Rule, Value, agree_in_terms};
use migration::guest::{Arriving, Host};
use migration::plan::StepFailure;
use migration::ram::Ram;
use migration::state::{StateError, StateReader, decode_exact};

use super::{Blueprint, Passenger, device_path, regions, with_device};
use crate::arch::profile::{Platform, ProcessorTerms, TSC_KHZ};
use crate::cause;
use crate::config::DeviceConfig;
use crate::machine::{HostSide, Machine};

const CHOOSE_ANOTHER: &str = "mend that, or choose another host";
const SAME_UVMM: &str = "use the same uvmm on both sides";

/// Builds machines for guests that arrive.
pub(crate) struct Builder {
    host: HostSide,
}

impl Builder {
    pub(crate) fn new(host: HostSide) -> Self {
        Self { host }
    }

    /// This host's device for `passenger`.
    fn device(&self, passenger: &Passenger) -> Option<DeviceConfig> {
        let found = self.host.devices.iter().find(|device| device.id == passenger.id)?;
        Some(DeviceConfig { slot: Some(passenger.slot), ..found.clone() })
    }

    /// Opens this host's device for each of the guest's; gives the profile with what they are.
    fn open_devices(
        &self,
        blueprint: &Blueprint,
        machine: &mut Machine,
        mut have: Profile,
        mismatches: &mut Vec<Mismatch>,
    ) -> Profile {
        for passenger in &blueprint.devices {
            let id = &passenger.id;
            let path = device_path(id);
            let Some(device) = self.device(passenger) else {
                let remedy =
                    format!("start the destination with --device vfio,id={id},host=… as well");
                mismatches.push(mismatch(&path, "a device of this id", "none".into(), &remedy));
                continue;
            };
            match machine.assigned_mut().prepare(&device) {
                Ok(function) => {
                    have = with_device(have, id, Rule::Host, &Identity::of(&*function));
                }
                Err(error) => {
                    let remedy = format!("see 'uvmm doctor --device {}' there", device.host);
                    mismatches.push(mismatch(&path, "a device", cause::chain(&error), &remedy));
                }
            }
        }
        let expected = |device: &&DeviceConfig| {
            !blueprint.devices.iter().any(|passenger| passenger.id == device.id)
        };
        for DeviceConfig { id, host, .. } in self.host.devices.iter().filter(expected) {
            let remedy = format!("leave the device {id} out at the destination");
            mismatches.push(mismatch(&device_path(id), "none", host.to_string(), &remedy));
        }
        have
    }
}

/// A machine that waits for its content.
#[derive(Debug)]
pub(crate) struct Awaiting {
    machine: Machine,
    blueprint: Blueprint,
    /// This host's devices for it.
    devices: Vec<DeviceConfig>,
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
        let Self { machine, blueprint: Blueprint { built_in, bounces, .. }, devices } = self;
        Settler { machine, built_in, bounces, devices }
    }
}

impl Host for Builder {
    type Guest = Awaiting;

    fn prepare(&mut self, offer: &Offer, memory: Option<File>) -> Result<Awaiting, Vec<Mismatch>> {
        let blueprint: Blueprint = decode_exact(&offer.config)
            .map_err(|error| refusal("machine", "a machine", cause::chain(&error), SAME_UVMM))?;
        let config = &blueprint.machine;
        let fits = config.check().and_then(|()| match memory {
            Some(_) => Ok(()), // it is on this host already
            None => config.check_host(self.host.hugepages),
        });
        fits.map_err(|error| {
            refusal("machine", &format!("{config:?}"), cause::chain(&error), CHOOSE_ANOTHER)
        })?;
        // Its devices come with its state, which tells which of them it has.
        let bare = HostSide { devices: Vec::new(), ..self.host.clone() };
        let mut machine = Machine::empty(config, &bare, memory.as_ref()).map_err(|error| {
            refusal("host", "a new machine", cause::chain(&error), CHOOSE_ANOTHER)
        })?;
        let (host, built) = (machine.shown(), machine.seen());
        let have = Platform::of_host(machine.vm(), host, built, guest_tsc_khz(offer))
            .map_err(|error| refusal("host", "its own features", cause::chain(&error), SAME_UVMM))?
            .profile();
        let ram = regions(machine.vm().ram());
        if ram != offer.ram {
            return Err(refusal(
                "ram",
                &format!("{:x?}", offer.ram),
                format!("{ram:x?}"),
                SAME_UVMM,
            ));
        }
        let mut mismatches = Vec::new();
        let have = self.open_devices(&blueprint, &mut machine, have, &mut mismatches);
        // Of a device that could not be had, nothing else is told.
        let had =
            |path: &str| !mismatches.iter().any(|m| path.starts_with(&format!("{}/", m.path)));
        let wanted = offer.profile.items().iter().filter(|item| had(&item.path));
        let wanted = wanted.fold(Profile::new(), |profile, item| {
            profile.with(item.path.clone(), item.rule, item.value.clone())
        });
        if let Err(others) = agree_in_terms(&wanted, &have, &ProcessorTerms) {
            mismatches.extend(others);
        }
        if !mismatches.is_empty() {
            return Err(mismatches);
        }
        let devices = blueprint.devices.iter().filter_map(|passenger| self.device(passenger));
        let devices = devices.collect();
        Ok(Awaiting { machine, blueprint, devices })
    }
}

fn mismatch(path: &str, wanted: &str, found: String, remedy: &str) -> Mismatch {
    Mismatch { path: path.into(), wanted: wanted.into(), found, remedy: remedy.into() }
}

fn refusal(path: &str, wanted: &str, found: String, remedy: &str) -> Vec<Mismatch> {
    vec![mismatch(path, wanted, found, remedy)]
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
        if self.blueprint.running {
            self.machine.resume()?;
        }
        Ok(())
    }
}
