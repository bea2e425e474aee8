//! After an arrival: the guest gets its devices back, those that it paused and those that it was
//! evicted from.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use migration::Homecoming;

use super::{Session, Tenant};
use crate::config::{DeviceConfig, DeviceId};
use crate::control::SlotProgress;
use crate::hotplug::{self, Asker, Opener};

/// How long a guest may take to use its devices again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells the source when one device serves the guest again.
#[derive(Debug)]
struct Teller {
    id: DeviceId,
    source: Arc<Mutex<Homecoming>>,
}

impl Asker for Teller {
    fn tell(&mut self, _progress: &SlotProgress) {}

    fn finish(self: Box<Self>, result: Result<u8, String>) {
        match result {
            Ok(_) => {
                let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
                source.back(self.id.as_str());
            }
            Err(error) => tracing::error!(id = %self.id, error, "the guest has no such device yet"),
        }
    }
}

impl Session {
    /// Gives the guest that has arrived its `devices`: waits for those that it resumes, and plugs
    /// in those that it came without.
    pub(super) fn bring_home(&mut self, devices: Vec<DeviceConfig>, homecoming: Homecoming) {
        let source = Arc::new(Mutex::new(homecoming));
        self.host.devices.clear();
        for device in devices {
            let Tenant::Here(machine) = &mut self.tenant else { return };
            let (Some(slots), Some(slot)) = (machine.slots().cloned(), device.slot) else {
                continue;
            };
            let waiting = machine.assigned_mut().take_waiting(&device.id);
            let asker = Box::new(Teller { id: device.id.clone(), source: source.clone() });
            let events = self.host.events.clone();
            let begun = match waiting {
                Some(function) => {
                    self.owed.push(device.clone());
                    let open: Opener = Box::new(move |_| Ok(function));
                    let order = self.order(device, slot, PATIENCE);
                    hotplug::plug(order, slots, open, asker, events)
                }
                None => {
                    self.host.devices.push(device.clone());
                    let order = self.order(device, slot, PATIENCE);
                    hotplug::await_resumed(order, slots, asker, events)
                }
            };
            self.began(begun);
        }
    }
}
