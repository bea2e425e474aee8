use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migration::state::testing::{assert_refuses_junk, assert_round_trip};
use proptest::prelude::*;

use super::function::VfioFunction;
use super::hardware::Interrupt;
use super::testing::{
    BAR_SIZE, Deed, EXPRESS, Fake, MSI, MSIX, PENDING, POWER, TABLE_BAR, UNKNOWN, VECTORS, World,
};
use crate::direct::PAGE;
use crate::irq::Message;
use crate::pci::identity::Identity;
use crate::pci::registers::command;
use crate::pci::{Effect, PciFunction};

const COMMAND: u16 = 4;
const MSIX_CONTROL: u16 = MSIX + 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

fn read<const N: usize>(function: &VfioFunction, offset: u16) -> [u8; N] {
    let mut data = [0xff; N];
    function.read_config(offset, &mut data);
    data
}

fn word(function: &VfioFunction, offset: u16) -> u16 {
    u16::from_le_bytes(read(function, offset))
}

/// Writes where the effect on the buses is not what is looked at.
fn write(function: &VfioFunction, offset: u16, data: &[u8]) {
    let _: Effect = function.write_config(offset, data);
}

fn put(function: &VfioFunction, offset: u16, value: u16) {
    write(function, offset, &value.to_le_bytes());
}

/// A function without a pin in a machine of its own.
fn scene() -> (Arc<Fake>, Arc<World>, VfioFunction) {
    let (fake, world) = (Fake::new(false), World::new());
    let function = world.function(&fake);
    fake.take();
    (fake, world, function)
}

/// Writes an entry of the interrupt table, as Linux does.
fn entry(function: &VfioFunction, vector: u64, data: u32, masked: bool) {
    let at = vector * 16;
    for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, u32::from(masked))] {
        let effect = function.write_bar(TABLE_BAR, at + offset, &value.to_le_bytes());
        assert_eq!(effect, Effect::None);
    }
}

fn message(data: u32) -> Option<Message> {
    Some(Message { address: 0xfee0_0000, data })
}

fn routes(world: &World) -> Vec<Option<Message>> {
    world.routes.lock().unwrap().values().copied().collect()
}

#[test]
fn the_header_is_the_devices_but_for_what_is_not_the_guests() {
    let (_, _, function) = scene();
    assert_eq!(read(&function, 0), [0x86, 0x80, 0xca, 0x10], "its identity");
    assert_eq!(read(&function, 8), [1, 0, 0, 2], "its class");
    assert_eq!(read(&function, 0x2c), [0x86, 0x80, 0x01, 0xa0], "its subsystem");
    assert_eq!(read(&function, 0x0e), [0], "it is alone in its device");
    assert_eq!(read(&function, 0x10), [0x0c, 0, 0, 0, 0, 0, 0, 0], "where the host has it");
    assert_eq!(read(&function, 0x30), [0; 4], "no ROM");
    write(&function, 0x30, &[0xff; 4]);
    assert_eq!(read(&function, 0x30), [0; 4]);
    assert_eq!(read(&function, 0x3d), [0], "no pin without an interrupt");
}

#[test]
fn the_chain_leads_past_what_the_guest_must_not_see() {
    let (_, _, function) = scene();
    let mut at = u16::from(read::<1>(&function, 0x34)[0]);
    let mut found = Vec::new();
    while at != 0 {
        let [id, next] = read(&function, at);
        found.push((id, at));
        at = next.into();
    }
    assert_eq!(found, [(1, POWER), (5, MSI), (0x11, MSIX), (0x10, EXPRESS)]);
    assert_eq!(read(&function, UNKNOWN), [0; 0x20], "nor by its offset");
    assert_eq!(word(&function, POWER + 2), 3, "no power states but on and off, no wake-up");
    assert_eq!(read(&function, EXPRESS + 4), [0x22, 0, 0, 0x10], "it can be reset");
}

#[test]
fn extended_capabilities_are_hidden_but_for_a_few() {
    let (_, _, function) = scene();
    assert_eq!(read(&function, 0x100), [0xff, 0xff, 0x01, 0x15], "leads on to the serial number");
    assert_eq!(read(&function, 0x104), [0]);
    assert_eq!(read(&function, 0x150), [3, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(read(&function, 0x200), [0; 8]);
}

#[test]
fn base_address_registers_are_sized_and_placed_by_the_guest_alone() {
    let (fake, _, function) = scene();
    assert_eq!(function.write_config(0x10, &[0xff; 8]), Effect::Decode);
    assert_eq!(read(&function, 0x10), [0x0c, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    write(&function, 0x18, &0xd000_1234_u32.to_le_bytes());
    let bars = function.bars();
    assert_eq!(
        bars.iter().map(|bar| (bar.index, bar.size)).collect::<Vec<_>>(),
        [(0, BAR_SIZE), (2, BAR_SIZE)]
    );
    assert_eq!(bars[1].address, 0xd000_0000);
    assert!(bars[0].prefetchable && !bars[1].prefetchable);
    assert_eq!(fake.take(), [], "the device does not hear of it");
}

#[test]
fn memory_can_be_enabled_where_the_devices_bit_is_wired_to_zero() {
    let (fake, _, function) = scene();
    assert!(function.bars().iter().all(|bar| !bar.decoding));
    assert_eq!(function.write_config(COMMAND, &[2, 0]), Effect::Decode);
    assert_eq!(word(&function, COMMAND), command::MEMORY);
    assert!(function.bars().iter().all(|bar| bar.decoding));
    put(&function, COMMAND, 0);
    assert_ne!(fake.command() & command::MEMORY, 0, "mappings stay usable to the last");
}

#[test]
fn a_function_masters_the_bus_if_the_guest_and_all_bridges_let_it() {
    let (fake, _, function) = scene();
    let masters = || fake.command() & command::MASTER != 0;
    put(&function, COMMAND, command::MASTER);
    assert!(!masters());
    function.allow_bus_master(true);
    assert!(masters());
    assert_eq!(word(&function, COMMAND), command::MASTER);
    function.allow_bus_master(false);
    assert!(!masters());
    function.allow_bus_master(true);
    put(&function, COMMAND, 0);
    assert!(!masters());
}

#[test]
fn memory_is_in_the_guest_but_for_the_pages_of_the_interrupt_table() {
    let (_, world, function) = scene();
    function.place_bar(0, Some(0x10_0000));
    function.place_bar(TABLE_BAR, Some(0x20_0000));
    let mapped = || world.mapped.lock().unwrap().clone().into_iter().collect::<Vec<_>>();
    assert_eq!(mapped(), [(0x10_0000, BAR_SIZE), (0x20_1000, PAGE), (0x20_3000, PAGE)]);
    function.place_bar(0, None);
    function.place_bar(TABLE_BAR, Some(0x30_0000));
    assert_eq!(mapped(), [(0x30_1000, PAGE), (0x30_3000, PAGE)]);
    drop(function);
    assert!(world.is_empty());
}

#[test]
fn an_access_that_is_not_mapped_reaches_the_device_and_the_table_does_not() {
    let (fake, _, function) = scene();
    let mut data = [0; 4];
    function.read_bar(TABLE_BAR, 0x1000, &mut data);
    assert_eq!(data, [0xb2; 4]);
    function.read_bar(TABLE_BAR, 12, &mut data);
    assert_eq!(data, [1, 0, 0, 0], "vectors are masked at power-on");
    assert_eq!(function.write_bar(0, 8, &[1, 2]), Effect::None);
    entry(&function, 0, 0x41, false);
    assert_eq!(function.write_bar(TABLE_BAR, PENDING, &[0xff]), Effect::None);
    assert_eq!(fake.take(), [Deed::WroteBar(0, 8, vec![1, 2])]);
}

#[test]
fn vectors_are_switched_on_as_the_guest_unmasks_them() {
    let (fake, world, function) = scene();
    put(&function, MSIX_CONTROL, MSIX_ENABLE | MASK_ALL);
    entry(&function, 0, 0x41, false);
    assert_eq!((fake.take(), routes(&world)), (vec![], vec![]), "all of them are masked");
    put(&function, MSIX_CONTROL, MSIX_ENABLE);
    let mut first = vec![false; 8];
    first[0] = true;
    assert_eq!(fake.take(), [Deed::Signals(Interrupt::Msix, 0, first.clone())]);
    entry(&function, 3, 0x42, false);
    assert_eq!(fake.take(), [Deed::Signals(Interrupt::Msix, 3, vec![true])]);
    entry(&function, 9, 0x43, false);
    let grown = (0..16).map(|vector| [0, 3, 9].contains(&vector)).collect();
    let all = [Deed::Disabled(Interrupt::Msix), Deed::Signals(Interrupt::Msix, 0, grown)];
    assert_eq!(fake.take(), all);
    assert_eq!(routes(&world), [message(0x41), message(0x42), message(0x43)]);
    put(&function, MSIX_CONTROL, 0);
    assert_eq!(fake.take(), [Deed::Disabled(Interrupt::Msix)]);
    assert!(world.is_empty());
}

#[test]
fn a_masked_vector_is_held_back_and_shows_as_pending() {
    let (fake, world, function) = scene();
    entry(&function, 1, 0x41, false);
    put(&function, MSIX_CONTROL, MSIX_ENABLE);
    entry(&function, 1, 0x41, true);
    assert_eq!(routes(&world), [None]);
    let pending = || {
        let mut data = [0; 8];
        function.read_bar(TABLE_BAR, PENDING, &mut data);
        u64::from_le_bytes(data)
    };
    assert_eq!(pending(), 0);
    fake.interrupt(Interrupt::Msix, 1);
    assert_eq!(pending(), 1 << 1);
    assert_eq!(pending(), 1 << 1, "looking does not take it away");
    entry(&function, 1, 0x55, false);
    assert_eq!(routes(&world), [message(0x55)], "the new message");
    put(&function, MSIX_CONTROL, MSIX_ENABLE | MASK_ALL);
    assert_eq!(routes(&world), [None]);
}

#[test]
fn msi_interrupts_by_as_many_vectors_as_the_guest_gives_it() {
    let (fake, world, function) = scene();
    write(&function, MSI + 4, &0xfee0_0000_u32.to_le_bytes());
    put(&function, MSI + 12, 0x50);
    put(&function, MSI + 2, 1 | 1 << 4);
    assert_eq!(routes(&world), [message(0x50), message(0x51)]);
    let kinds: Vec<_> = fake
        .take()
        .into_iter()
        .map(|deed| matches!(deed, Deed::Signals(Interrupt::Msi, ..)))
        .collect();
    assert!(!kinds.is_empty() && kinds.iter().all(|msi| *msi));
    put(&function, MSI + 2, 0);
    assert_eq!(fake.take(), [Deed::Disabled(Interrupt::Msi)]);
    assert!(world.is_empty());
}

#[test]
fn a_pin_is_used_while_there_are_no_messages() {
    let (fake, world) = (Fake::new(true), World::new());
    let function = world.function(&fake);
    assert_eq!(read(&function, 0x3d), [1], "a lone function has INTA");
    fake.take();
    function.wire(world.clone());
    let on = [Deed::Signals(Interrupt::Intx, 0, vec![true]), Deed::UnmasksItself];
    assert_eq!(fake.take(), on);
    put(&function, COMMAND, command::INTX_DISABLE);
    assert_ne!(fake.command() & command::INTX_DISABLE, 0, "VFIO masks it");
    fake.take();
    put(&function, MSIX_CONTROL, MSIX_ENABLE);
    assert_eq!(fake.take(), [Deed::Disabled(Interrupt::Intx)]);
    assert!(world.is_empty());
    put(&function, MSIX_CONTROL, 0);
    assert_eq!(fake.take(), on);
    drop(function);
    assert!(world.is_empty());
}

#[test]
fn what_a_device_lacks_of_its_configuration_space_is_zero() {
    let (fake, world) = (Fake::plain(), World::new());
    let function = world.function(&fake);
    assert_eq!(read(&function, 0xfc), [0, 0, 0x77, 0]);
    assert_eq!(read(&function, 0x100), [0; 4]);
    fake.take();
    write(&function, 0xfc, &[1, 2, 3, 4]);
    assert_eq!(fake.take(), [Deed::WroteConfig(0xfc, vec![1, 2, 3])]);
    write(&function, 0x100, &[0xff; 4]);
    assert_eq!(fake.take(), []);
}

#[test]
fn a_pin_that_is_not_unmasked_in_the_kernel_is_unmasked_by_us() {
    let (fake, world) = (Fake::plain(), World::new());
    let function = world.function(&fake);
    fake.take();
    function.wire(world.clone());
    assert_eq!(fake.take(), [Deed::Signals(Interrupt::Intx, 0, vec![true])]);
    for _ in 0..3 {
        world.ended.lock().unwrap().as_ref().unwrap().write(1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while fake.deeds.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "it stays masked");
            std::thread::yield_now();
        }
        assert_eq!(fake.take(), [Deed::Unmasked]);
    }
    drop(function);
    assert_eq!(fake.take()[0], Deed::Disabled(Interrupt::Intx));
    assert!(world.is_empty());
}

#[test]
fn a_function_level_reset_puts_all_of_it_in_the_state_after_power_on() {
    let (fake, world, function) = scene();
    function.allow_bus_master(true);
    put(&function, COMMAND, command::MASTER | command::MEMORY);
    write(&function, 0x10, &[0; 8]);
    write(&function, 0x18, &0xd000_0000_u32.to_le_bytes());
    entry(&function, 0, 0x41, false);
    put(&function, MSIX_CONTROL, MSIX_ENABLE);
    put(&function, POWER + 4, 3);
    fake.take();
    assert_eq!(function.write_config(EXPRESS + 8, &[0x10, 0x80]), Effect::Decode);
    let deeds = fake.take();
    assert_eq!(deeds[..2], [Deed::Disabled(Interrupt::Msix), Deed::Reset]);
    assert!(matches!(deeds[2..], [Deed::WroteConfig(4, _)]), "{deeds:?}");
    assert_eq!(fake.command() & command::MASTER, 0);
    assert!(world.is_empty());
    assert_eq!(
        [COMMAND, 0x18, MSIX_CONTROL & !1, POWER + 4].map(|at| word(&function, at)),
        [0, 0, VECTORS - 1, 8]
    );
    let mut control = [0];
    function.read_bar(TABLE_BAR, 12, &mut control);
    assert_eq!(control, [1]);
}

#[test]
fn a_device_that_cannot_be_reset_does_not_offer_it() {
    let (fake, world) = (Fake::stubborn(), World::new());
    let function = world.function(&fake);
    assert_eq!(read(&function, EXPRESS + 4), [0x22, 0, 0, 0]);
    fake.take();
    assert_eq!(function.write_config(EXPRESS + 8, &[0x10, 0x80]), Effect::None);
    assert_eq!(fake.take(), [Deed::WroteConfig((EXPRESS + 8).into(), vec![0x10, 0])]);
    function.reset();
    assert!(!fake.take().contains(&Deed::Reset));
}

#[test]
fn a_wide_access_is_cut_at_double_words_and_at_what_is_not_the_devices() {
    let (fake, _, function) = scene();
    write(&function, EXPRESS + 2, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    let at = |offset: u16, data: &[u8]| Deed::WroteConfig((EXPRESS + offset).into(), data.to_vec());
    assert_eq!(fake.take(), [at(2, &[1, 2]), at(8, &[7, 8, 9, 10]), at(12, &[11, 12])]);
    assert_eq!(read(&function, EXPRESS + 1), [0, 1, 2, 0x22, 0, 0, 0x10, 7]);
}

#[test]
fn what_the_host_has_to_say_reaches_the_owner() {
    let (fake, world, function) = scene();
    fake.interrupt(Interrupt::Error, 0);
    fake.interrupt(Interrupt::Request, 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    let told = || [&world.failures, &world.wishes].map(|count| count.load(Ordering::SeqCst));
    while told() != [1, 1] && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(told(), [1, 1]);
    drop(function);
}

#[test]
fn a_bridge_is_no_device_for_a_guest() {
    let fake = Fake::new(false);
    fake.config.lock().unwrap()[0x0e] = 1;
    let world = World::new();
    let machine = super::Machine { messages: world.clone(), direct: world.clone(), owner: world };
    let refused = VfioFunction::new("fake".into(), fake, machine).err().unwrap();
    assert!(refused.to_string().contains("it is a bridge"), "{refused}");
}

/// What the guest may write into the device's own configuration space, besides the command
/// register: status, and the body of PCI Express without its capabilities.
fn may_write(offset: u64, data: &[u8]) -> bool {
    let end = offset + data.len() as u64;
    let within = |start: u16, stop: u16| u64::from(start) <= offset && end <= u64::from(stop);
    let reset = u64::from(EXPRESS + 9);
    let resets = (offset..end).contains(&reset)
        && data[usize::try_from(reset - offset).unwrap()] & 0x80 != 0;
    let own = within(4, 8) || within(0x154, 0x15c);
    let gaps = [(0x48, 0x50), (0x5e, 0x70), (0x7c, 0x80), (0xa2, 0xa4), (0xa8, 0x100)];
    !resets && (own || gaps.iter().any(|(start, stop)| within(*start, *stop)))
}

proptest! {
    #[test]
    fn whatever_a_guest_writes_stays_within_what_is_its_own(
        writes in prop::collection::vec(
            (0u16..4096, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 0..64,
        ),
    ) {
        let (fake, world, function) = scene();
        let identity = read::<4>(&function, 0);
        for (offset, data, config) in &writes {
            if *config {
                let offset = (*offset).min(4096 - 8);
                // Half of them where most is.
                let offset = if data[0] & 1 == 0 { offset & 0xff } else { offset };
                let _: Effect = function.write_config(offset, data);
                function.read_config(offset, &mut vec![0xff; data.len()]);
            } else {
                let _: Effect = function.write_bar(TABLE_BAR, u64::from(*offset), data);
                function.read_bar(TABLE_BAR, u64::from(*offset) * 3, &mut vec![0xff; data.len()]);
            }
        }
        for deed in fake.take() {
            match deed {
                Deed::WroteConfig(offset, data) => {
                    prop_assert!(may_write(offset, &data), "{:#x} {:x?}", offset, data);
                }
                Deed::WroteBar(_, offset, _) => {
                    prop_assert!(offset >= u64::from(VECTORS) * 16, "{offset:#x}");
                }
                _ => {}
            }
        }
        prop_assert_eq!(read::<4>(&function, 0), identity);
        drop(function);
        prop_assert!(world.is_empty());
    }

    #[test]
    fn no_configuration_space_of_a_device_is_too_strange(
        bytes in prop::collection::vec((0usize..4096, any::<u8>()), 0..200),
    ) {
        let (fake, world) = (Fake::new(true), World::new());
        for (at, byte) in bytes {
            fake.config.lock().unwrap()[at] = byte;
        }
        let machine =
            super::Machine { messages: world.clone(), direct: world.clone(), owner: world };
        if let Ok(function) = VfioFunction::new("fake".into(), fake, machine) {
            function.read_config(0, &mut [0; 4096]);
            let _: Effect = function.write_config(0, &[0xff; 4096]);
            function.reset();
        }
    }
}

#[test]
fn another_function_takes_the_place_of_one_whose_guest_moved() {
    let (_, _, from) = scene();
    write(&from, 0x10, &[0, 0, 0, 0xd0, 1, 0, 0, 0]);
    put(&from, COMMAND, command::MEMORY);
    put(&from, MSIX_CONTROL, MSIX_ENABLE);
    entry(&from, 0, 0x31, false);
    entry(&from, 1, 0x32, true);
    let (fake, world, to) = scene();
    assert_round_trip(&from, &to);
    assert_eq!(Identity::of(&from), Identity::of(&to));
    assert_eq!(routes(&world)[0], message(0x31), "its interrupts go where the guest had them go");
    assert!(!routes(&world).contains(&message(0x32)), "but for those that are masked");
    assert!(fake.take().iter().any(|deed| matches!(deed, Deed::Signals(Interrupt::Msix, ..))));
    assert_eq!(to.bars()[0].address, 0x1_d000_0000);
    assert!(to.bars()[0].decoding);
}

#[test]
fn no_state_that_nobody_saved_is_taken() {
    let (_, _, function) = scene();
    put(&function, MSIX_CONTROL, MSIX_ENABLE);
    assert_refuses_junk(&function);
}
