//! What a guest may make of its buses, and what it may not.

use std::collections::BTreeMap;

use migration::state::testing::{load, saved};
use proptest::prelude::*;

use super::*;
use crate::pci::registers::COMMAND;
use crate::pci::testing::{BRIDGE, Board, Card, MEMORY, PREFETCHABLE, SLOT_1, WORKING_REGISTERS};

const PLACED: [(u8, u64); 3] = [(0, PREFETCHABLE + 0x4000), (2, 0xc010_0000), (3, 0xc040)];

fn answers(board: &Board) -> [bool; 3] {
    [
        board.mmio.read(PLACED[0].1, &mut [0]),
        board.mmio.read(PLACED[1].1, &mut [0]),
        board.pio.read(PLACED[2].1, &mut [0]),
    ]
}

#[test]
fn a_card_answers_where_the_guest_put_it() {
    let board = Board::new();
    let card = board.cold();
    assert_eq!(answers(&board), [false; 3]);
    board.start_card();
    assert_eq!(card.diary().placed, BTreeMap::from(PLACED));
    assert_eq!(answers(&board), [true; 3]);
    let mut data = [0; 4];
    board.mmio.read(PLACED[1].1 + 0xffc, &mut data);
    assert_eq!(data, [0xa2; 4]);
    assert!(!board.mmio.read(PLACED[1].1 + 0x1000, &mut data), "past its end");
}

#[test]
fn its_command_register_gates_it() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    board.write(SLOT_1, COMMAND, &[1]);
    assert_eq!(answers(&board), [false, false, true]);
    board.write(SLOT_1, COMMAND, &[2]);
    assert_eq!(answers(&board), [true, true, false]);
    assert_eq!(card.diary().placed.len(), 2);
}

#[test]
fn the_bridge_s_command_register_gates_it_too() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    assert!(card.diary().master);
    for (command, expected, master) in [
        (0, [false, false, false], false),
        (1, [false, false, true], false),
        (2, [true, true, false], false),
        (4, [false, false, false], true),
        (7, [true, true, true], true),
    ] {
        board.write(BRIDGE, COMMAND, &[command]);
        assert_eq!((answers(&board), card.diary().master), (expected, master), "{command}");
    }
}

#[test]
fn the_bridge_s_windows_gate_it_too() {
    let board = Board::new();
    board.cold();
    board.start_card();
    board.write(BRIDGE, 0x22, &[0, 0xc0]);
    assert_eq!(answers(&board), [true, false, true], "memory now ends before it");
    board.write(BRIDGE, 0x28, &8_u32.to_le_bytes());
    assert_eq!(answers(&board), [false, false, true], "prefetchable memory begins after it");
    board.write(BRIDGE, 0x1c, &[0xd0]);
    assert_eq!(answers(&board), [false; 3]);
}

#[test]
fn a_move_takes_it_from_where_it_was() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    board.write(SLOT_1, 0x18, &0xc020_0000_u32.to_le_bytes());
    assert_eq!(answers(&board), [true, false, true]);
    assert_eq!(card.diary().placed.get(&2), Some(&0xc020_0000));
}

#[test]
fn it_is_never_put_over_ram_or_another_device() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    // All windows open, so that only the host bridge's are left.
    board.write(BRIDGE, 0x20, &[0, 0, 0xf0, 0xff]);
    for address in [0_u32, 0x0010_0000, 0x7fff_f000, 0xe000_0000, 0xfec0_0000, 0xfee0_0000] {
        board.write(SLOT_1, 0x18, &address.to_le_bytes());
        assert_eq!(card.diary().placed.get(&2), None, "{address:#x}");
    }
    let taken = u32::try_from(WORKING_REGISTERS).unwrap();
    board.write(SLOT_1, 0x18, &taken.to_le_bytes());
    assert_eq!(card.diary().placed.get(&2), None, "the hot-plug controller answers there");
    board.pio.insert(0xc0a0, 1, Arc::new(Nothing)).unwrap();
    board.write(SLOT_1, 0x1c, &0xc0a0_u32.to_le_bytes());
    assert_eq!(card.diary().placed.get(&3), None, "another device's port");
}

struct Nothing;

impl crate::bus::BusDevice for Nothing {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn of_two_at_one_address_the_lower_answers_until_it_goes_away() {
    let board = Board::new();
    let first = board.cold();
    let second = Card::new();
    board.topology.insert(Place::new(board.behind, 2, 0), second.clone()).unwrap();
    board.bridge.touch(|shpc| shpc.insert_cold(1));
    let slot_2 = (1, 2 << 3);
    board.write(slot_2, 0x18, &0xc010_0000_u32.to_le_bytes());
    board.write(slot_2, COMMAND, &[2, 0]);
    assert_eq!(second.diary().placed.get(&2), Some(&0xc010_0000));
    board.start_card();
    assert_eq!(second.diary().placed.get(&2), None);
    assert_eq!(first.diary().placed.get(&2), Some(&0xc010_0000));
    board.write(SLOT_1, COMMAND, &[0]);
    assert_eq!(second.diary().placed.get(&2), Some(&0xc010_0000));
}

#[test]
fn what_is_removed_leaves_nothing_on_any_bus() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    let place = Place::new(board.behind, 1, 0);
    assert!(board.topology.get(place).is_some());
    assert!(board.topology.remove(place).is_some());
    assert_eq!(answers(&board), [false; 3]);
    let left = card.diary();
    assert!(left.placed.is_empty() && !left.master);
    assert_eq!(board.read(SLOT_1, 0), [0xff; 4]);
    assert_eq!(Arc::strong_count(&card), 1, "somebody still holds it");
    assert!(board.topology.remove(place).is_none());
}

#[test]
fn buses_are_reached_by_the_numbers_that_the_guest_gave_them() {
    let board = Board::new();
    board.cold();
    let place = Place::new(board.behind, 1, 0);
    assert_eq!(board.read(SLOT_1, 0), 0x1234_5678_u32.to_le_bytes());
    assert_eq!(board.topology.address(place).unwrap().to_string(), "01:01.0");
    board.write(BRIDGE, 0x18, &[0, 7, 9]);
    assert_eq!(board.read(SLOT_1, 0), [0xff; 4]);
    assert_eq!(board.read((7, 8), 0), 0x1234_5678_u32.to_le_bytes());
    assert_eq!(board.read((8, 8), 0), [0xff; 4], "a bus behind it that is not there");
    assert_eq!(board.topology.address(place).unwrap().to_string(), "07:01.0");
    board.write(BRIDGE, 0x18, &[0, 0, 0]);
    assert_eq!(board.topology.address(place), None);
}

#[test]
fn resetting_the_secondary_bus_resets_what_is_behind_and_hides_it_meanwhile() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    board.write(BRIDGE, 0x3e, &[0x40]);
    assert_eq!(card.diary().resets, 1);
    assert_eq!(board.read(SLOT_1, 0), [0xff; 4]);
    assert_eq!(answers(&board), [false; 3]);
    board.write(BRIDGE, 0x3e, &[0]);
    assert_eq!(card.diary().resets, 1);
    assert_eq!(board.read(SLOT_1, COMMAND), [0, 0]);
}

#[test]
fn pins_reach_their_lines_through_the_bridge() {
    let board = Board::new();
    let card = board.cold();
    card.assert_intx();
    // INTA of device 1 is INTB of the bridge, which is device 1: the third line.
    let levels: Vec<_> = board.lines.iter().map(|line| line.level()).collect();
    assert_eq!(levels.iter().position(|level| *level), Some(2));
    board.topology.remove(Place::new(board.behind, 1, 0));
    drop(card);
    assert!(!board.lines[2].level(), "a card that is gone interrupts nobody");
}

#[test]
fn places_are_taken_once_and_only_on_buses_that_are_there() {
    let board = Board::new();
    let host = Place::new(ROOT, 0, 0);
    assert_eq!(board.topology.insert(host, Card::new()), Err(PlaceError::Taken));
    let nowhere = Place::new(BusId(9), 0, 0);
    assert_eq!(board.topology.insert(nowhere, Card::new()), Err(PlaceError::NoBus));
}

#[test]
fn a_guest_that_arrives_must_find_its_functions_and_its_registers_take_effect() {
    let (from, to, other) = (Board::new(), Board::new(), Board::new());
    let (_, card) = (from.cold(), to.cold());
    from.start_card();
    // The card's own state is its own; a guest would have programmed it alike.
    to.start_card();
    to.write(BRIDGE, COMMAND, &[0]);
    assert!(card.diary().placed.is_empty());
    assert!(load(&*other.topology, &saved(&*from.topology)).is_err());
    load(&*to.bridge, &saved(&*from.bridge)).unwrap();
    load(&*to.topology, &saved(&*from.topology)).unwrap();
    assert_eq!(card.diary().placed, BTreeMap::from(PLACED));
}

proptest! {
    #[test]
    fn no_guest_gets_a_card_anywhere_but_into_the_windows(
        writes in prop::collection::vec(
            (any::<bool>(), 0u16..0x60, prop::collection::vec(any::<u8>(), 1..9)), 0..64),
        commands in prop::collection::vec((0u64..0x40, any::<u32>()), 0..16),
    ) {
        let board = Board::new();
        let card = board.cold();
        board.start_card();
        let mut commands = commands.into_iter();
        for (bridge, offset, data) in writes {
            board.write(if bridge { BRIDGE } else { SLOT_1 }, offset, &data);
            if let Some((register, value)) = commands.next() {
                board.mmio.write(WORKING_REGISTERS + register, &value.to_le_bytes());
            }
            for (bar, at) in card.diary().placed {
                let windows = [0x1000..0x1_0000, MEMORY..0xe000_0000, PREFETCHABLE..2 * PREFETCHABLE];
                let windows = if bar == 3 { &windows[..1] } else { &windows[1..] };
                prop_assert!(windows.iter().any(|window| window.contains(&at)), "{bar} {at:#x}");
            }
        }
        board.topology.remove(Place::new(board.behind, 1, 0));
        prop_assert_eq!(card.diary().placed.len(), 0);
        prop_assert_eq!(Arc::strong_count(&card), 1);
    }
}
