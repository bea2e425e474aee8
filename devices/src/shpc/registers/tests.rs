//! The register set as the specification and Linux's driver have it.

use proptest::prelude::*;

use super::super::slot::Led;
use super::*;

const COMMAND_AT: u64 = 0x14;
const STATUS_AT: u64 = 0x16;
const LOCATOR_AT: u64 = 0x18;
const SERR_INT_AT: u64 = 0x20;

fn slot_at(slot: u64) -> u64 {
    0x24 + 4 * slot
}

fn read32(controller: &Controller, at: u64) -> u32 {
    let mut data = [0xff; 4];
    controller.read(at, &mut data);
    u32::from_le_bytes(data)
}

fn status(controller: &Controller) -> u16 {
    let mut data = [0xff; 2];
    controller.read(STATUS_AT, &mut data);
    u16::from_le_bytes(data)
}

fn write32(controller: &mut Controller, at: u64, value: u32) {
    controller.write(at, &value.to_le_bytes());
}

/// A command as a driver gives it: target and code in one store of 16 bits.
fn command(controller: &mut Controller, target: u8, code: u8) {
    controller.write(COMMAND_AT, &[code, target]);
}

/// A controller whose driver listens, with everything unmasked and a card in its first slot.
fn listening() -> Controller {
    let mut controller = Controller::new(4);
    controller.insert_cold(0);
    write32(&mut controller, SERR_INT_AT, 0);
    for slot in 0..4 {
        write32(&mut controller, slot_at(slot), 0);
    }
    controller
}

#[test]
fn it_tells_how_many_slots_there_are_and_what_they_have() {
    for slots in [1, 4, 31] {
        let controller = Controller::new(slots);
        let slots = u32::from(slots);
        assert_eq!(read32(&controller, 0x00), 0, "the registers start where the BAR does");
        assert_eq!(read32(&controller, 0x04), slots, "all of them at 33 MHz");
        assert_eq!(read32(&controller, 0x08), 0);
        assert_eq!(read32(&controller, 0x0c), 0xe001_0100 | slots);
        assert_eq!(read32(&controller, 0x10), 0x0100_0000);
        assert_eq!(controller.size(), 0x24 + 4 * u64::from(slots));
    }
}

#[test]
fn after_power_on_everything_is_masked() {
    let controller = Controller::new(2);
    assert_eq!(read32(&controller, SERR_INT_AT), 0xf);
    assert_eq!(read32(&controller, slot_at(0)) >> 24, 0x7f);
    assert!(!controller.interrupts() && !controller.hears_button(0));
}

#[test]
fn a_store_to_the_command_register_executes_it_and_tells_of_its_end() {
    let mut controller = listening();
    command(&mut controller, 1, 0x1f);
    assert_eq!(controller.view(0).unwrap().state, State::Disabled);
    assert_eq!(status(&controller), 0, "neither busy nor an error");
    assert_eq!(read32(&controller, LOCATOR_AT), 1);
    assert!(controller.interrupts());
    write32(&mut controller, SERR_INT_AT, 1 << 16);
    assert!(!controller.interrupts());
}

#[test]
fn commands_that_cannot_be_done_say_why() {
    const MRL_OPEN: u16 = 2;
    const INVALID: u16 = 4;
    const SPEED: u16 = 8;
    let mut controller = listening();
    for (target, code, expected) in [
        (1, 0x04, 0),
        (2, 0x01, MRL_OPEN),
        (1, 0x01, INVALID),
        (0, 0x04, INVALID),
        (5, 0x04, INVALID),
        (0, 0x40, 0),
        (0, 0x41, SPEED),
        (0, 0x47, SPEED),
        (0, 0x48, INVALID),
        (0, 0x49, INVALID),
        (0, 0x4a, INVALID),
        (0, 0x50, INVALID),
        (0, 0xbf, INVALID),
        (0, 0xc0, INVALID),
        (0, 0xff, INVALID),
        (1, 0x08, 0),
    ] {
        write32(&mut controller, SERR_INT_AT, 1 << 16);
        command(&mut controller, target, code);
        assert_eq!(status(&controller), expected, "{code:#x} for {target}");
        assert_eq!(read32(&controller, LOCATOR_AT) & 1, 1, "{code:#x} ends even so");
    }
}

#[test]
fn all_slots_with_a_card_are_powered_or_enabled_together() {
    let mut controller = listening();
    controller.insert(2);
    command(&mut controller, 1, 0x1f);
    command(&mut controller, 0, 0x48);
    let states =
        |controller: &Controller| [0, 1, 2].map(|slot| controller.view(slot).unwrap().state);
    use State::{Disabled, Enabled, PoweredOnly};
    assert_eq!(states(&controller), [PoweredOnly, Disabled, PoweredOnly]);
    command(&mut controller, 0, 0x49);
    assert_eq!(states(&controller), [Enabled, Disabled, Enabled]);
    assert_eq!(controller.view(2).unwrap().power, Led::On);
    assert_eq!(controller.connected(), 1 << 1 | 1 << 3);
}

#[test]
fn the_target_alone_starts_nothing() {
    let mut controller = listening();
    controller.write(COMMAND_AT + 1, &[1]);
    assert!(!controller.interrupts());
    controller.write(COMMAND_AT, &[0x1f]);
    assert_eq!(controller.view(0).unwrap().state, State::Disabled);
}

#[test]
fn the_locator_names_each_slot_that_is_not_masked() {
    let mut controller = listening();
    controller.press_button(1);
    controller.press_button(3);
    assert_eq!(read32(&controller, LOCATOR_AT), 0b10100);
    controller.write(slot_at(1) + 3, &[1 << 2]);
    assert_eq!(read32(&controller, LOCATOR_AT), 0b10000);
}

#[test]
fn the_line_drops_under_the_global_mask_and_rises_again_with_what_is_left() {
    // As Linux's interrupt handler does: mask, look, clear, unmask, each by writing back what it
    // read, which also clears a finished command.
    let mut controller = listening();
    controller.press_button(0);
    let read = read32(&controller, SERR_INT_AT);
    write32(&mut controller, SERR_INT_AT, read | 1);
    assert!(!controller.interrupts(), "masked");
    controller.press_button(1);
    let read = read32(&controller, slot_at(0));
    write32(&mut controller, slot_at(0), read);
    let read = read32(&controller, SERR_INT_AT);
    write32(&mut controller, SERR_INT_AT, read & !1);
    assert!(controller.interrupts(), "the second slot's event came in between");
    let read = read32(&controller, slot_at(1));
    write32(&mut controller, slot_at(1), read);
    assert!(!controller.interrupts());
}

#[test]
fn a_driver_that_starts_clears_what_happened_before_it() {
    let mut controller = Controller::new(1);
    controller.insert_cold(0);
    controller.press_button(0);
    // shpc_init writes each slot register back with its masks set, then opens them.
    let all_masked = read32(&controller, slot_at(0));
    write32(&mut controller, slot_at(0), all_masked);
    write32(&mut controller, slot_at(0), all_masked & !0x7f00_0000);
    write32(&mut controller, SERR_INT_AT, 0);
    assert!(controller.hears_button(0) && !controller.interrupts());
}

#[test]
fn narrow_stores_reach_their_bytes_alone() {
    let mut controller = listening();
    controller.press_button(0);
    controller.write(slot_at(0) + 3, &[0x7f]);
    assert_eq!(read32(&controller, slot_at(0)) >> 16, 0x7f04, "masked, and still pressed");
    controller.write(slot_at(0) + 2, &[4]);
    assert_eq!(read32(&controller, slot_at(0)) >> 16, 0x7f00);
}

#[test]
fn power_on_keeps_the_cards() {
    let mut controller = listening();
    command(&mut controller, 1, 0x1f);
    controller.reset();
    assert_eq!(controller.connected(), 1 << 1);
    assert_eq!(read32(&controller, SERR_INT_AT), 0xf);
}

#[test]
fn a_state_with_other_cards_or_slots_is_refused() {
    let mut controller = listening();
    let saved = controller.save();
    assert!(Controller::new(3).load(&saved).is_err());
    assert!(Controller::new(4).load(&saved).is_err(), "a card is missing");
    let mut twin = Controller::new(4);
    twin.insert_cold(0);
    twin.load(&saved).unwrap();
    assert_eq!(twin, controller);
    controller.press_button(0);
    assert_ne!(twin, controller);
}

proptest! {
    #[test]
    fn any_guest_is_withstood(
        steps in prop::collection::vec(
            (0u8..8, 0u64..0xa0, prop::collection::vec(any::<u8>(), 0..9)), 0..128),
    ) {
        let mut controller = listening();
        for (what, at, data) in steps {
            match what {
                0 => controller.insert(low_byte(u32::try_from(at).unwrap()) % 5),
                1 => controller.pull(low_byte(u32::try_from(at).unwrap()) % 5),
                _ => controller.write(at, &data),
            }
            controller.read(at, &mut vec![0; data.len()]);
            prop_assert_eq!(read32(&controller, 0x0c), 0xe001_0104);
            prop_assert_eq!(status(&controller) & 1, 0, "it is never busy");
            let mut twin = controller.clone();
            twin.reset();
            twin.load(&controller.save()).unwrap();
            prop_assert_eq!(&twin, &controller);
        }
    }
}
