//! The host's devices that a guest has.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::shpc::{SlotError, Slots};
use devices::vfio::{self, Container, Owner, VfioDeviceFd, VfioFunction};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use crate::config::{DeviceConfig, DeviceId};
use crate::event::{Event, Events};
use crate::kvm::{self, Routes, Vm};

/// What tells of a guest's devices in a saved state.
pub(super) const FORMAT: Format = Format::of::<AssignedV1>();

/// Why a guest is not given a device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The host does not give it.
    #[error("cannot give the guest the device {id}")]
    Open {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: vfio::Error,
    },
    /// It does not fit into the machine.
    #[error("cannot put the device {id} into its slot")]
    Slot {
        /// The device.
        id: DeviceId,
        /// Why not.
        #[source]
        source: SlotError,
    },
    /// There is nowhere to put it.
    #[error("there is no slot for the device {0}: ask for more by --pci-slots")]
    NoSlot(DeviceId),
}

/// The host's devices that a guest has, and what it takes to give it more.
pub(crate) struct Assigned {
    /// The slot of each. Only the slot holds the function: taken out, it is gone.
    devices: BTreeMap<DeviceId, u8>,
    /// Open, and in no slot yet: the guest that arrives tells which it has.
    waiting: BTreeMap<DeviceId, Arc<VfioFunction>>,
    opener: Arc<Opener>,
}

/// What it takes to open devices for one guest, on any thread.
pub(crate) struct Opener {
    container: Container,
    messages: Arc<Routes>,
    direct: Arc<kvm::Slots>,
    events: Events,
}

impl Assigned {
    /// None yet, for a machine of `vm`.
    pub(super) fn new(vm: &Arc<Vm>, messages: Arc<Routes>, events: Events) -> Self {
        let container = Container::new(vm.ram().clone(), tracker(vm));
        let direct = Arc::new(kvm::Slots::new(vm.clone()));
        let opener = Arc::new(Opener { container, messages, direct, events });
        Self { devices: BTreeMap::new(), waiting: BTreeMap::new(), opener }
    }

    /// The ids of those that it has.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &DeviceId> {
        self.devices.keys()
    }

    /// The slot of the device `id`.
    pub(crate) fn slot(&self, id: &DeviceId) -> Option<u8> {
        self.devices.get(id).copied()
    }

    /// What opens more of them.
    pub(crate) fn opener(&self) -> &Arc<Opener> {
        &self.opener
    }

    /// Takes note of a device that is in `slot` from now on.
    pub(crate) fn note(&mut self, id: DeviceId, slot: u8) {
        self.devices.insert(id, slot);
    }

    /// Forgets a device that is no longer there.
    pub(crate) fn forget(&mut self, id: &DeviceId) {
        self.devices.remove(id);
    }

    /// Forgets those whose slot has no card any more; gives their ids.
    pub(crate) fn forget_lost(&mut self, slots: &Slots) -> Vec<DeviceId> {
        let is_lost = |slot: u8| !slots.status(slot).is_ok_and(|status| status.view.card);
        let lost = self.devices.iter().filter(|(_, slot)| is_lost(**slot));
        let lost: Vec<_> = lost.map(|(id, _)| id.clone()).collect();
        lost.iter().for_each(|id| self.forget(id));
        lost
    }

    /// Opens `device` for a guest that arrives.
    pub(crate) fn prepare(&mut self, device: &DeviceConfig) -> Result<Arc<VfioFunction>, Error> {
        let function = self.opener.open(device)?;
        self.waiting.insert(device.id.clone(), function.clone());
        Ok(function)
    }

    /// Gives away a device that was prepared and that the guest did not have when it arrived.
    pub(crate) fn take_waiting(&mut self, id: &DeviceId) -> Option<Arc<VfioFunction>> {
        self.waiting.remove(id)
    }

    /// Saves which devices there are, and each of them.
    pub(super) fn save(&self, slots: &Slots, out: &mut StateWriter) -> Result<(), StateError> {
        let function = |slot: u8| slots.function(slot);
        let there =
            self.devices.iter().filter_map(|(id, slot)| Some((id, *slot, function(*slot)?)));
        let mut devices = Vec::new();
        for (id, slot, function) in there {
            function.save(out.at(format!("device/{id}")))?;
            devices.push((id.clone(), slot));
        }
        out.at("devices").put(&AssignedV1 { devices })
    }

    /// Puts the devices that the guest has into their slots, out of those that wait for it.
    pub(super) fn load(
        &mut self,
        slots: &Slots,
        from: &mut StateReader<'_>,
    ) -> Result<(), StateError> {
        let AssignedV1 { devices } = from.at("devices").take()?;
        for (id, slot) in devices {
            let function = self.waiting.remove(&id).ok_or_else(|| {
                StateError::invalid::<AssignedV1>("the guest has a device that was not offered")
            })?;
            slots
                .insert_cold(slot, function.clone())
                .map_err(|error| StateError::owner("put a device into its slot", error))?;
            function.load(from.at(format!("device/{id}")))?;
            self.devices.insert(id, slot);
        }
        Ok(())
    }

    /// Puts `devices` into their slots, before the guest runs: those first that name one.
    pub(super) fn insert_cold(
        &mut self,
        devices: &[DeviceConfig],
        slots: Option<&Slots>,
    ) -> Result<(), Error> {
        let (placed, others): (Vec<_>, Vec<_>) =
            devices.iter().partition(|device| device.slot.is_some());
        for device in placed.into_iter().chain(others) {
            let none = || Error::NoSlot(device.id.clone());
            let slots = slots.ok_or_else(none)?;
            let number = device.slot.or_else(|| slots.free()).ok_or_else(none)?;
            let function = self.opener.open(device)?;
            slots
                .insert_cold(number, function)
                .map_err(|source| Error::Slot { id: device.id.clone(), source })?;
            self.devices.insert(device.id.clone(), number);
        }
        Ok(())
    }
}

/// The devices of a guest by id, with their slots.
#[derive(Serialize, Deserialize)]
pub(crate) struct AssignedV1 {
    devices: Vec<(DeviceId, u8)>,
}

impl Saved for AssignedV1 {
    const KIND: &'static str = "assigned-devices";
    const VERSION: u16 = 1;
}

impl Opener {
    /// Opens a device for this guest; it is in no slot yet.
    pub(crate) fn open(&self, device: &DeviceConfig) -> Result<Arc<VfioFunction>, Error> {
        let machine = vfio::Machine {
            messages: self.messages.clone(),
            direct: self.direct.clone(),
            owner: Arc::new(Complaints { id: device.id.clone(), events: self.events.clone() }),
        };
        VfioFunction::open(&device.host.sysfs(), &self.container, machine)
            .map_err(|source| Error::Open { id: device.id.clone(), source })
    }
}

/// KVM's own list of the guest's devices; without one, a few mediated devices do not work.
fn tracker(vm: &Vm) -> Option<Arc<VfioDeviceFd>> {
    let mut wanted =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
    vm.fd()
        .create_device(&mut wanted)
        .inspect_err(|error| tracing::debug!(%error, "KVM_CREATE_DEVICE: no VFIO"))
        .ok()
        .map(|fd| Arc::new(VfioDeviceFd::new_from_kvm(fd)))
}

/// Passes on what the host has to say of a device.
struct Complaints {
    id: DeviceId,
    events: Events,
}

impl Owner for Complaints {
    fn device_failed(&self) {
        self.events.send(Event::DeviceFailed(self.id.clone()));
    }

    fn device_wanted(&self) {
        self.events.send(Event::DeviceWanted(self.id.clone()));
    }
}
