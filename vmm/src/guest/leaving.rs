//! A machine on its way out.

use std::fmt;
use std::sync::Arc;

use devices::pci::identity::Identity;
use migration::compat::{Offer, Profile, Rule};
use migration::guest::Departing;
use migration::plan::{Meanwhile, Phase, Plan, Priority, Step, StepFailure};
use migration::policy::Shares;
use migration::ram::{DirtySet, Ram, layout};
use migration::report::Device;
use migration::state::{StateError, StateWriter};

use super::{Blueprint, Passenger};
use crate::arch::profile::Platform;
use crate::config::{DeviceConfig, DeviceId, VmName};
use crate::control::PlannedDevice;
use crate::dirty;
use crate::machine::{Machine, Seats, formats};
use crate::power::PowerSwitch;
use crate::strategy::{
    Abilities, Choice, Evict, Moving, Pause, StayPaused, WantDirtying, Way, choose,
};
use crate::vcpu::{self, Throttle, Vcpus};

/// Bytes of state of one vCPU and of everything else, about; extended state can be larger.
const VCPU_BYTES: u64 = 16 << 10;
const DEVICES_BYTES: u64 = 16 << 10;

/// A machine that leaves.
pub(crate) struct Leaving {
    machine: Machine,
    traits: Traits,
    profile: Profile,
    /// The devices that it has, once it is known how each moves.
    moving: Option<Moving>,
    dirty: DirtySet,
    throttle: Throttle,
    plan: Plan,
}

/// What there is to know of a guest besides its machine.
#[derive(Debug)]
pub(crate) struct Traits {
    pub(crate) name: VmName,
    /// Whether it is the built-in one.
    pub(crate) built_in: bool,
    /// Whether it was told to bounce all DMA.
    pub(crate) bounces: bool,
    /// The devices that it may have, as the user gave them.
    pub(crate) devices: Vec<DeviceConfig>,
}

/// A machine that cannot leave.
pub(crate) struct Stays {
    pub(crate) machine: Box<Machine>,
    pub(crate) error: vcpu::Error,
}

impl Leaving {
    /// A guest on its way out.
    pub(crate) fn new(machine: Machine, traits: Traits) -> Result<Self, Stays> {
        let profile = match machine.msrs() {
            Ok(msrs) => Platform::of_guest(machine.vm(), machine.seen(), &msrs).wanted(),
            Err(error) => return Err(Stays { machine: Box::new(machine), error }),
        };
        let dirty = dirty::sources(machine.vm(), machine.vcpus());
        let throttle = Throttle::new(machine.vcpus().clone());
        Ok(Self { machine, traits, profile, moving: None, dirty, throttle, plan: Plan::new() })
    }

    /// Where its devices are; none if it was given no slots.
    pub(crate) fn seats(&self) -> Option<Seats> {
        self.machine.seats()
    }

    /// Gives the machine back, as the plan left it, with the devices that could not be given back
    /// to the guest.
    pub(crate) fn into_machine(mut self) -> (Machine, Vec<DeviceId>) {
        let slots = self.machine.slots().cloned();
        let lost = slots.map(|slots| self.machine.assigned_mut().forget_lost(&slots));
        (self.machine, lost.unwrap_or_default())
    }

    /// How each device would move, for people.
    pub(crate) fn planned_devices(&self) -> Vec<PlannedDevice> {
        let Some(moving) = &self.moving else { return Vec::new() };
        let all = moving.lock();
        let told = all.iter().map(|passenger| {
            let Choice { way, why, better } = passenger.choice;
            PlannedDevice {
                id: passenger.config.id.to_string(),
                strategy: way.name().to_owned(),
                why: why.to_owned(),
                better: better.map(str::to_owned),
            }
        });
        told.collect()
    }

    /// Chooses how each device moves.
    fn choose(&self) -> Result<Option<Moving>, StepFailure> {
        let Some(slots) = self.machine.slots() else { return Ok(None) };
        let block = slots.block();
        let mut chosen = Vec::new();
        for device in &self.traits.devices {
            let Some(slot) = self.machine.assigned().slot(&device.id) else { continue };
            let runs = self.machine.is_running();
            let choice = choose(
                device,
                Abilities {
                    runs,
                    hears_button: runs && slots.comes_to_listen(slot)?,
                    dirties: block.dirtying_active,
                    bounces: self.traits.bounces,
                    pauses: block.can_pause,
                },
            )?;
            chosen.push((device.clone(), slot, choice));
        }
        Ok((!chosen.is_empty())
            .then(|| Moving::new(slots.clone(), self.machine.power().clone(), chosen)))
    }

    /// The steps that the devices need.
    fn plan_devices(&mut self, moving: &Moving) {
        let (phase, ways) = (Phase::Precopy, moving.ways());
        if ways.contains(&Way::EvictEarly) {
            self.plan.at(phase, Priority::EVICT, Evict::new(moving.clone(), Way::EvictEarly));
        }
        if moving.promised() && ways.iter().any(|way| *way != Way::EvictEarly) {
            self.plan.at(phase, Priority::GUEST, WantDirtying(moving.clone()));
        }
        if ways.contains(&Way::EvictLate) {
            let step = Evict::new(moving.clone(), Way::EvictLate);
            self.plan.at(Phase::Release, Priority::EVICT, step);
        }
        if ways.contains(&Way::Pause) {
            self.plan.at(Phase::Release, Priority::GUEST, Pause::new(moving.clone()));
            self.plan.at(Phase::Quiesce, Priority::ASSIGNED, StayPaused(moving.clone()));
        }
    }

    /// The devices as the destination must know them.
    fn passengers(&self) -> Vec<Passenger> {
        let Some(moving) = &self.moving else { return Vec::new() };
        let all = moving.lock();
        let told = all
            .iter()
            .map(|passenger| Passenger { id: passenger.config.id.clone(), slot: passenger.slot });
        told.collect()
    }

    /// What the destination must be able to read.
    fn written_formats(&self, profile: Profile) -> Profile {
        let ways = self.moving.as_ref().map(Moving::ways).unwrap_or_default();
        // One that is evicted leaves no state.
        let devices = ways.contains(&Way::Pause);
        let formats = formats::written(self.machine.slots().is_some(), devices);
        formats.fold(profile, |profile, format| format.written(profile))
    }

    /// What the destination's devices must be like.
    fn device_profile(&self, mut profile: Profile) -> Profile {
        let Some(moving) = &self.moving else { return profile };
        for passenger in moving.lock().iter() {
            let Some(function) = moving.slots().function(passenger.slot) else { continue };
            let rule = match passenger.choice.way {
                Way::Pause => Rule::Eq,
                // The guest finds a driver for whatever it is given.
                Way::EvictEarly | Way::EvictLate => Rule::Host,
            };
            let id = &passenger.config.id;
            profile = super::with_device(profile, id, rule, &Identity::of(&*function));
        }
        profile
    }
}

impl Departing for Leaving {
    fn prepare(&mut self, _meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        self.moving = self.choose()?;
        self.plan = Plan::new();
        let running = self.machine.is_running();
        let (vcpus, power) = (self.machine.vcpus().clone(), self.machine.power().clone());
        self.plan.at(Phase::Quiesce, Priority::VCPUS, StopVcpus { vcpus, power, running });
        if let Some(moving) = self.moving.clone() {
            self.plan_devices(&moving);
        }
        Ok(())
    }

    fn offer(&self) -> Offer {
        let blueprint = Blueprint {
            machine: self.machine.config().clone(),
            running: self.machine.is_running(),
            built_in: self.traits.built_in,
            bounces: self.traits.bounces,
            devices: self.passengers(),
        };
        Offer {
            name: self.traits.name.to_string(),
            config: blueprint.encode(),
            profile: self.written_formats(self.device_profile(self.profile.clone())),
            ram: layout(self.ram()),
        }
    }

    fn ram(&self) -> &Ram {
        self.machine.vm().ram()
    }

    fn dirty(&mut self) -> &mut DirtySet {
        &mut self.dirty
    }

    fn throttle(&mut self, shares: &Shares) {
        self.throttle.set(shares);
    }

    fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }

    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        self.machine.save(out)
    }

    fn state_size(&self) -> u64 {
        self.machine.vcpus().count() as u64 * VCPU_BYTES + DEVICES_BYTES
    }

    fn devices(&self) -> Vec<Device> {
        self.moving.as_ref().map(Moving::report).unwrap_or_default()
    }

    fn is_back(&mut self, id: &str) {
        if let Some(moving) = &self.moving {
            moving.is_back(id);
        }
    }
}

/// Stops the vCPUs, and lets them run again if they ran before.
struct StopVcpus {
    vcpus: Arc<Vcpus>,
    power: Arc<PowerSwitch>,
    running: bool,
}

impl Step for StopVcpus {
    fn name(&self) -> String {
        match self.vcpus.count() {
            1 => "stop the vCPU".to_owned(),
            count => format!("stop {count} vCPUs"),
        }
    }

    fn enter(&mut self, _meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        self.vcpus.pause()?;
        if self.power.is_used() {
            // There is nothing to give back: the guest waits for a power supply to go off.
            return Err("the guest has switched itself off or asked for a reset".into());
        }
        Ok(())
    }

    fn undo(&mut self) {
        if self.running
            && let Err(error) = self.vcpus.resume()
        {
            tracing::error!(%error, "cannot let the guest run again");
        }
    }
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").field("machine", &self.machine).finish_non_exhaustive()
    }
}
