//! Devices that come and go, as the main loop sees it: who may, where to, and what the guest has.

use std::time::Duration;

use devices::pci::Bdf;
use devices::shpc::{Led, SlotError, Slots, State, Status};

use super::{Next, Session, Tenant};
use crate::arch::layout;
use crate::cause;
use crate::config::{DeviceConfig, DeviceId};
use crate::control::{Light, Power, Replier, SlotInfo};
use crate::hotplug::{self, Asker, Change, Opener, Order, Underway};
use crate::machine::{Machine, Seats};

const NO_SLOTS: &str = "the guest has no slots for devices: run it with --pci-slots";

impl Session {
    /// Brings `device` in, and answers when the guest uses it.
    pub(super) fn plug(&mut self, device: DeviceConfig, timeout_ms: u64, reply: Replier) {
        let slot = match self.slot_for(&device) {
            Ok(slot) => slot,
            Err(why) => return reply.finish::<()>(Err(why)),
        };
        let order = self.order(device, slot, Duration::from_millis(timeout_ms));
        let Tenant::Here(machine) = &self.tenant else { unreachable!("it has a free slot") };
        let slots = machine.slots().expect("one of them is free").clone();
        let opener = machine.assigned().opener().clone();
        let open: Opener = Box::new(move |device| match opener.open(device) {
            Ok(function) => Ok(function),
            Err(error) => Err(cause::chain(&error)),
        });
        let begun = hotplug::plug(order, slots, open, Box::new(reply), self.host.events.clone());
        self.began(begun);
    }

    /// Brings the device `id` out, and answers when the host has it back.
    pub(super) fn unplug(&mut self, id: &DeviceId, timeout_ms: u64, reply: Replier) {
        let (device, slot) = match self.device(id) {
            Ok(found) => found,
            Err(why) => return reply.finish::<()>(Err(why)),
        };
        let order = self.order(device, slot, Duration::from_millis(timeout_ms));
        let Tenant::Here(machine) = &self.tenant else { unreachable!("it has the device") };
        let slots = machine.slots().expect("the device is in one").clone();
        let begun = hotplug::unplug(order, slots, Box::new(reply), self.host.events.clone());
        self.began(begun);
    }

    pub(super) fn order(&mut self, device: DeviceConfig, slot: u8, limit: Duration) -> Order {
        self.orders += 1;
        Order { serial: self.orders, device, slot, limit }
    }

    pub(super) fn began(&mut self, begun: Result<Underway, (Box<dyn Asker>, std::io::Error)>) {
        match begun {
            Ok(underway) => self.plugging.push(underway),
            Err((asker, error)) => {
                asker.finish(Err(format!("cannot start a thread: {error}")));
            }
        }
    }

    /// Takes note of a device that is in or out by now.
    pub(super) fn plugged(&mut self, serial: u64) -> Next {
        let found = self.plugging.iter().position(|underway| underway.serial() == serial);
        // It may be over already, with the machine that it was for.
        if let Some(index) = found {
            let underway = self.plugging.swap_remove(index);
            self.conclude(underway);
        }
        Next::Stay
    }

    /// Ends all waiting for the guest that is here, as it comes to its end.
    pub(super) fn stop_plugging(&mut self) {
        self.plugging.iter().for_each(Underway::cancel);
        while let Some(underway) = self.plugging.pop() {
            self.conclude(underway);
        }
    }

    fn conclude(&mut self, underway: Underway) {
        self.owed.retain(|device| device.id != underway.device().id);
        let Some(mut finished) = underway.finish() else {
            return tracing::error!("a thread that waited for the guest broke");
        };
        let assigned = match &mut self.tenant {
            Tenant::Here(machine) => Some(machine.assigned_mut()),
            _ => None,
        };
        // A guest that boots again finds the devices where it left them.
        match finished.change.take() {
            Some(Change::In(device, slot)) => {
                if let Some(assigned) = assigned {
                    assigned.note(device.id.clone(), slot);
                }
                self.host.devices.push(DeviceConfig { slot: Some(slot), ..device });
            }
            Some(Change::Out(id)) => {
                if let Some(assigned) = assigned {
                    assigned.forget(&id);
                }
                self.host.devices.retain(|device| device.id != id);
            }
            None => {}
        }
        finished.answer();
    }

    /// Refuses what cannot go on beside devices that come and go.
    pub(super) fn nothing_is_plugged(&self) -> Result<(), String> {
        self.plugging.first().map_or(Ok(()), |underway| {
            let id = &underway.device().id;
            Err(format!("{id} is being plugged or unplugged: wait until that is over"))
        })
    }

    /// The machine that answers, and its slots.
    fn answering(&mut self, what: &str) -> Result<(&Machine, &Slots), String> {
        let machine = self.machine(what)?;
        if !machine.is_running() {
            return Err("a paused guest does not answer: resume it first".to_owned());
        }
        let slots = machine.slots().ok_or(NO_SLOTS)?;
        Ok((machine, slots))
    }

    /// Where `device` goes.
    fn slot_for(&mut self, device: &DeviceConfig) -> Result<u8, String> {
        self.answering("plug a device into")?;
        let under_way = self.plugging.iter().map(Underway::device);
        for other in self.host.devices.iter().chain(under_way) {
            if other.id == device.id {
                let id = &device.id;
                return Err(format!("the id {id} is in use: choose another, or unplug {id} first"));
            }
            if other.host.sysfs() == device.host.sysfs() {
                let (host, id) = (&device.host, &other.id);
                return Err(format!("the guest has {host} already, as {id}: unplug it first"));
            }
        }
        let promised: Vec<u8> = self.plugging.iter().map(Underway::slot).collect();
        let (_, slots) = self.answering("plug a device into")?;
        choose(slots, device.slot, &promised)
    }

    /// The device `id`, and the slot that it is in.
    pub(super) fn device(&mut self, id: &DeviceId) -> Result<(DeviceConfig, u8), String> {
        self.answering("unplug a device from")?;
        if self.plugging.iter().any(|underway| underway.device().id == *id) {
            return Err(format!("{id} is being plugged or unplugged: wait until that is over"));
        }
        let (machine, _) = self.answering("unplug a device from")?;
        let slot = machine.assigned().slot(id);
        let device = self.host.devices.iter().find(|device| device.id == *id);
        device.cloned().zip(slot).ok_or_else(|| {
            let ids: Vec<_> = self.host.devices.iter().map(|device| device.id.as_str()).collect();
            let there = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
            format!("the guest has no device {id}: it has {there}")
        })
    }

    /// How all slots stand.
    pub(super) fn slots(&self) -> Vec<SlotInfo> {
        let seats = match &self.tenant {
            Tenant::Here(machine) => machine.seats(),
            Tenant::Leaving { seats, .. } => seats.clone(),
            _ => None,
        };
        let Some(Seats { slots, devices }) = seats else { return Vec::new() };
        let device = |number: u8| {
            let on_its_way = self.plugging.iter().find(|underway| underway.slot() == number);
            let id = devices.get(&number);
            id.or(on_its_way.map(|underway| &underway.device().id)).cloned()
        };
        let status = |number: u8| slots.status(number).ok();
        slots.numbers().filter_map(status).map(|s| describe(&slots, s, device(s.number))).collect()
    }
}

fn describe(slots: &Slots, status: Status, device: Option<DeviceId>) -> SlotInfo {
    let Status { number, view, listening, .. } = status;
    let devfn = slots.place(number).map_or(0, |place| place.devfn);
    let address = Bdf { bus: layout::SLOT_BUS, device: devfn >> 3, function: devfn & 7 };
    let light = |led| match led {
        Led::On => Light::On,
        Led::Blink => Light::Blink,
        Led::Off => Light::Off,
    };
    SlotInfo {
        number,
        address: format!("0000:{address}"),
        device: device.filter(|_| view.card),
        state: match view.state {
            State::PoweredOnly => Power::Powered,
            State::Enabled => Power::Enabled,
            State::Disabled => Power::Disabled,
        },
        power_led: light(view.power),
        attention_led: light(view.attention),
        driver: listening,
    }
}

/// A slot that is free; `promised` ones are not.
fn choose(slots: &Slots, wanted: Option<u8>, promised: &[u8]) -> Result<u8, String> {
    let count = slots.numbers().count();
    let is_free = |number: u8| {
        !promised.contains(&number) && slots.status(number).is_ok_and(|slot| !slot.view.card)
    };
    Ok(match wanted {
        Some(number) if !slots.numbers().any(|known| known == number) => {
            return Err(format!("there is no slot {number}: choose 1 to {count}"));
        }
        Some(number) if !is_free(number) => return Err(SlotError::Taken(number).to_string()),
        Some(number) => number,
        None => slots.numbers().find(|number| is_free(*number)).ok_or_else(|| {
            format!("all {count} slots are taken: unplug a device, or run the guest with more by --pci-slots")
        })?,
    })
}
