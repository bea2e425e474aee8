//! Guests that one host offers and another looks at, on this machine's own KVM.

use std::collections::BTreeSet;

use migration::guest::Departing;
use migration::state::StateWriter;

use super::*;
use crate::config::{DirtyTracking, SerialMode};
use crate::console::Console;
use crate::event;
use crate::guest::{Leaving, Traits};
use crate::machine::Alarm;
use crate::vcpu::block_kicks;

fn builder(devices: &[&str]) -> Builder {
    let console = Console::open(&SerialMode::Null).unwrap();
    let (events, _unheard) = event::queue().unwrap();
    Builder::new(HostSide {
        hugepages: None,
        dirty_tracking: DirtyTracking::Log,
        devices: devices.iter().map(|device| device.parse().unwrap()).collect(),
        output: console.output(),
        room: console.room(),
        alarm: Alarm::new().unwrap(),
        events,
    })
}

/// A machine with so many slots; none where there is no KVM.
fn machine(pci_slots: u8) -> Option<Machine> {
    block_kicks().unwrap();
    let config = MachineConfig { pci_slots, ..smallest() };
    let machine = Machine::empty(&config, &builder(&[]).host, None);
    machine.map_err(|error| eprintln!("skipped: no usable KVM: {error}")).ok()
}

/// What a guest of this machine offers.
fn offer() -> Option<Offer> {
    let machine = machine(0)?;
    let name = "web".parse().unwrap();
    let traits = Traits { name, built_in: true, bounces: false, devices: Vec::new() };
    Some(Leaving::new(machine, traits).ok().unwrap().offer())
}

/// The offer with another blueprint.
fn changed(offer: &Offer, change: impl FnOnce(&mut Blueprint)) -> Offer {
    let mut blueprint = Blueprint::decode(&offer.config).unwrap();
    change(&mut blueprint);
    Offer { config: blueprint.encode(), ..offer.clone() }
}

/// The offer of a guest that relies on every feature of one kind that a processor can tell of.
fn demanding(mut offer: Offer) -> Offer {
    let items = offer.profile.items().iter().cloned().map(|mut item| {
        if item.path == "cpu/features/7.0-ebx" {
            item.value = Value::Bits(vec![u32::MAX.into()]);
        }
        item
    });
    offer.profile = items.fold(Profile::new(), Profile::with_item);
    offer
}

fn against(builder: &mut Builder, offer: &Offer) -> Vec<String> {
    let mismatches = builder.prepare(offer, None).err().unwrap_or_default();
    mismatches.into_iter().map(|mismatch| mismatch.path).collect()
}

#[test]
fn a_guest_fits_the_host_that_it_is_on() {
    let Some(offer) = offer() else { return };
    assert_eq!(against(&mut builder(&[]), &offer), <[&str; 0]>::default());
}

#[test]
fn whatever_else_is_wrong_with_a_guest_its_processors_and_devices_are_told_of() {
    let Some(offer) = offer() else { return };
    let mut builder = builder(&["vfio,id=mine,host=ffff:ff:1f.7"]);
    let passenger = || Passenger { id: "its".parse().unwrap(), slot: 1 };
    let with_device = demanding(changed(&offer, |blueprint| blueprint.devices.push(passenger())));
    let rest = ["device/its", "device/mine", "cpu/features/7.0-ebx"];
    assert_eq!(against(&mut builder, &with_device), rest);

    let of_it = |spoil: fn(&mut Blueprint)| changed(&with_device, spoil);
    let huge = of_it(|blueprint| blueprint.machine.memory = 1 << 50);
    let odd = of_it(|blueprint| (blueprint.machine.memory, blueprint.machine.cpus) = (1 << 50, 99));
    for (offer, machines) in [(huge, 1), (odd, 2)] {
        let told = against(&mut builder, &offer);
        let machines = vec!["machine"; machines];
        assert_eq!(told, [&rest[..2], &machines, &rest[2..]].concat());
    }

    let elsewhere = Offer { ram: vec![(0, 4096)], ..with_device.clone() };
    assert_eq!(against(&mut builder, &elsewhere), [&rest[..], &["ram"]].concat());

    let cut = with_device.config.len() - 1;
    let unread = Offer { config: with_device.config[..cut].to_vec(), ..with_device };
    assert_eq!(against(&mut builder, &unread), ["machine", "cpu/features/7.0-ebx"]);
}

#[test]
fn a_device_that_a_host_cannot_open_is_told_with_all_else() {
    let Some(offer) = offer() else { return };
    let mut builder = builder(&["vfio,id=its,host=ffff:ff:1f.7"]);
    let passenger = || Passenger { id: "its".parse().unwrap(), slot: 1 };
    let offer = demanding(changed(&offer, |blueprint| {
        blueprint.devices.push(passenger());
        blueprint.machine.memory = 1 << 50;
    }));
    let profile = offer.profile.clone().with("device/its/model", Rule::Eq, "a card");
    let told = against(&mut builder, &Offer { profile, ..offer });
    assert_eq!(told, ["machine", "device/its", "cpu/features/7.0-ebx"]);
}

#[test]
fn the_formats_that_are_told_of_are_those_that_a_state_has() {
    for slots in [0, 2] {
        let Some(machine) = machine(slots) else { return };
        let mut state = StateWriter::new();
        machine.save(&mut state).unwrap();
        let state = StateReader::open(state.bytes()).unwrap();
        let told: BTreeSet<_> =
            formats::written(slots > 0, false).map(|format| format.kind()).collect();
        assert_eq!(state.kinds().collect::<BTreeSet<_>>(), told);
    }
}

#[test]
fn a_state_that_cannot_be_read_is_told_of_before_anything_moves() {
    let Some(offer) = offer() else { return };
    let newer = offer.profile.items().iter().cloned().map(|mut item| {
        if item.path == "state/uart16550" {
            item.value = Value::Numbers(BTreeSet::from([77]));
        }
        item
    });
    let profile = newer.fold(Profile::new(), Profile::with_item);
    let profile = profile.with("state/sound", Rule::Subset, BTreeSet::from([1]));
    let newer = demanding(Offer { profile, ..offer });
    let told = against(&mut builder(&[]), &newer);
    assert_eq!(told, ["cpu/features/7.0-ebx", "state/uart16550", "state/sound"]);
}
