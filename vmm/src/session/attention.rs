//! What the host has to say of a guest's devices.

use std::time::Duration;

use super::{Next, Session, Tenant};
use crate::config::DeviceId;
use crate::control::SlotProgress;
use crate::hotplug::{self, Asker};

/// How long the guest may take to let go of a device that the host wants back.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes into the log whether the host got a device back.
#[derive(Debug)]
struct Log(DeviceId);

impl Asker for Log {
    fn tell(&mut self, _progress: &SlotProgress) {}

    fn finish(self: Box<Self>, result: Result<u8, String>) {
        match result {
            Ok(_) => tracing::info!(device = %self.0, "the host has the device back"),
            Err(error) => {
                tracing::error!(device = %self.0, error, "the host waits for the device");
            }
        }
    }
}

impl Session {
    /// The host wants a device back: the guest is asked to let go of it, as by `uvmm unplug`; a
    /// guest that was to arrive with it stays where it is.
    ///
    /// The host asks again every few seconds, so what cannot be done now is tried later.
    pub(super) fn device_wanted(&mut self, id: &DeviceId) -> Next {
        match &self.tenant {
            Tenant::Arriving { underway, .. } => {
                let host = self.config.devices.iter().find(|device| device.id == *id);
                let host = host.map_or_else(String::new, |device| format!(" ({})", device.host));
                let why = format!("its host wants the device {id}{host} back: choose another");
                underway.cancel.withdraw(why);
            }
            Tenant::Here(_) => self.hand_back(id),
            Tenant::Leaving { .. } | Tenant::Undecided { .. } | Tenant::Between => {
                tracing::warn!(device = %id, "the host wants the device back: not before the \
                                              migration is over");
            }
        }
        Next::Stay
    }

    fn hand_back(&mut self, id: &DeviceId) {
        if self.plugging.iter().any(|underway| underway.device().id == *id) {
            return; // it was asked for already, or comes and can be asked for soon
        }
        let (device, slot) = match self.device(id) {
            Ok(found) => found,
            Err(why) => {
                tracing::warn!(device = %id, why, "the host wants the device back");
                return;
            }
        };
        tracing::warn!(device = %id, "the host wants the device back: asking the guest for it");
        let order = self.order(device, slot, PATIENCE);
        let Tenant::Here(machine) = &self.tenant else { unreachable!("it has the device") };
        let slots = machine.slots().expect("the device is in one").clone();
        let log = Box::new(Log(id.clone()));
        let begun = hotplug::unplug(order, slots, log, self.host.events.clone());
        self.began(begun);
    }

    /// A device is broken: no guest arrives with it, and the driver of one that has it is left to
    /// see what it can do.
    pub(super) fn device_failed(&mut self, id: &DeviceId) -> Next {
        tracing::error!(device = %id, "the device had an error that it cannot correct");
        if let Tenant::Arriving { underway, .. } = &self.tenant {
            let why = format!("the device {id} of its host had an error that it cannot correct");
            underway.cancel.withdraw(why);
        }
        Next::Stay
    }
}
