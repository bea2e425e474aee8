//! The assigned devices of a guest that is on its way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::shpc::Slots;
use migration::plan::StepFailure;
use migration::report::Device;

use super::{Choice, Way};
use crate::config::{DeviceConfig, DeviceId};
use crate::power::PowerSwitch;

/// The assigned devices of a guest that is on its way: the steps of the plan and whoever reports
/// share it.
#[derive(Clone)]
pub(crate) struct Moving {
    slots: Arc<Slots>,
    power: Arc<PowerSwitch>,
    /// Whether the devices may work longer because the guest promised to tell what they write.
    promised: bool,
    passengers: Arc<Mutex<Vec<Passenger>>>,
}

/// A device of such a guest.
pub(crate) struct Passenger {
    pub(crate) config: DeviceConfig,
    pub(crate) slot: u8,
    pub(crate) choice: Choice,
    /// What came out of the slot, to be put in again where the guest stays.
    function: Option<Arc<dyn PciFunction>>,
    /// Since when the guest has been without it.
    since: Option<Instant>,
    /// For how long it was, once it has one again.
    without: Option<Duration>,
}

impl Moving {
    /// Devices behind `slots`: each with its slot, and how it is to move.
    pub(crate) fn new(
        slots: Arc<Slots>,
        power: Arc<PowerSwitch>,
        devices: Vec<(DeviceConfig, u8, Choice)>,
    ) -> Self {
        let passenger = |(config, slot, choice)| Passenger {
            config,
            slot,
            choice,
            function: None,
            since: None,
            without: None,
        };
        let passengers = devices.into_iter().map(passenger).collect();
        let promised = slots.block().dirtying_active;
        Self { slots, power, promised, passengers: Arc::new(Mutex::new(passengers)) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Passenger>> {
        self.passengers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots that they are in.
    pub(crate) fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Whether the guest promised to tell what they write.
    pub(crate) fn promised(&self) -> bool {
        self.promised
    }

    /// Fails if the guest broke its promise: nobody knows what the devices wrote.
    pub(super) fn check_promise(&self) -> Result<(), StepFailure> {
        if self.promised && !self.slots.block().promise_is_kept() {
            return Err("the guest no longer tells what its devices write (was its driver \
                        unloaded?): migrate again"
                .into());
        }
        Ok(())
    }

    /// Fails if the guest switched itself off or asked for a reset: it answers nothing any more.
    pub(super) fn check_power(&self) -> Result<(), StepFailure> {
        if self.power.is_used() { Err("the guest is off".into()) } else { Ok(()) }
    }

    /// How they move.
    pub(crate) fn ways(&self) -> Vec<Way> {
        self.lock().iter().map(|passenger| passenger.choice.way).collect()
    }

    /// The devices that move in this way, with their slots.
    pub(super) fn by(&self, way: Way) -> Vec<(DeviceId, u8)> {
        let all = self.lock();
        let chosen = all.iter().filter(|passenger| passenger.choice.way == way);
        chosen.map(|passenger| (passenger.config.id.clone(), passenger.slot)).collect()
    }

    /// Their names, for people: `net0, net1`.
    pub(super) fn names(devices: &[(DeviceId, u8)]) -> String {
        devices.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn with<T>(&self, id: &DeviceId, act: impl FnOnce(&mut Passenger) -> T) -> Option<T> {
        self.lock().iter_mut().find(|passenger| passenger.config.id == *id).map(act)
    }

    /// From now on the guest is without it.
    pub(super) fn is_away(&self, id: &DeviceId) {
        self.with(id, |passenger| {
            passenger.since.get_or_insert_with(Instant::now);
        });
    }

    /// The guest has it, or another in its place.
    pub(crate) fn is_back(&self, id: &str) {
        if let Some(passenger) = self.lock().iter_mut().find(|p| p.config.id.as_str() == id) {
            passenger.without = passenger.since.take().map(|since| since.elapsed());
        }
    }

    /// It moves in another way than was chosen.
    pub(super) fn instead(&self, id: &DeviceId, way: Way) {
        self.with(id, |passenger| passenger.choice.way = way);
    }

    /// Keeps what came out of its slot.
    pub(super) fn keep(&self, id: &DeviceId, function: Arc<dyn PciFunction>) {
        self.with(id, |passenger| passenger.function = Some(function));
    }

    /// What was kept.
    pub(super) fn take(&self, id: &DeviceId) -> Option<Arc<dyn PciFunction>> {
        self.with(id, |passenger| passenger.function.take()).flatten()
    }

    /// For the report.
    pub(crate) fn report(&self) -> Vec<Device> {
        let all = self.lock();
        let told = all.iter().map(|passenger| {
            let since = passenger.since.map(|since| since.elapsed());
            let without = passenger.without.or(since).unwrap_or_default();
            Device {
                id: passenger.config.id.to_string(),
                strategy: passenger.choice.way.name().to_owned(),
                paused_ms: u64::try_from(without.as_millis()).unwrap_or(u64::MAX),
            }
        });
        told.collect()
    }
}
