//! The bridge as its driver finds it.

use std::sync::atomic::{AtomicU8, Ordering};

use migration::state::testing::{assert_refuses_junk, load, saved};
use proptest::prelude::*;

use super::*;
use crate::irq::Message;
use crate::pci::capability;
use crate::pci::testing::{BRIDGE, Board, SLOT_1};
use crate::shpc::State as SlotState;

const MSI_AT: u16 = 0x40;
const SERR_INT: u64 = 0x20;
const FIRST_SLOT: u64 = 0x24;

fn capability_at(board: &Board, wanted: u8) -> u16 {
    let chain = capability::walk(|at| board.read::<1>(BRIDGE, at)[0]);
    chain.iter().find(|(id, _)| *id == wanted).expect("it is in the chain").1
}

/// A driver that listens: everything unmasked, and MSI switched on if `msi`.
fn listen(board: &Board, msi: bool) {
    if msi {
        board.write(BRIDGE, MSI_AT + 4, &0xfee0_0000_u32.to_le_bytes());
        board.write(BRIDGE, MSI_AT + 12, &[0x31, 0]);
        board.write(BRIDGE, MSI_AT + 2, &[1, 0]);
    }
    board.write(BRIDGE, COMMAND, &[7]);
    board.drive(SERR_INT, &[0; 4]);
    board.drive(FIRST_SLOT, &[0; 4]);
}

#[test]
fn shpchp_recognises_it() {
    let board = Board::new();
    assert_eq!(board.read(BRIDGE, 0x08), [0, 0, 4, 6], "class 06.04, interface 0");
    assert_eq!(board.read(BRIDGE, 0x0e), [1], "a type 1 header");
    assert_eq!(board.read(BRIDGE, 0x3d), [1], "INTA");
    assert_eq!(board.read(BRIDGE, 0x10), 0xd000_0000_u32.to_le_bytes());
    let chain = capability::walk(|at| board.read::<1>(BRIDGE, at)[0]);
    let ids: Vec<_> = chain.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [id::MSI, id::SHPC, id::SLOT_ID, id::VENDOR]);
}

#[test]
fn its_windows_and_buses_are_there_from_the_start() {
    let board = Board::new();
    assert_eq!(board.read(BRIDGE, 0x18), [0, 1, 1], "primary, secondary, subordinate");
    assert_eq!(board.read(BRIDGE, 0x1c), [0xc0, 0xc0]);
    assert_eq!(board.read(BRIDGE, 0x20), [0x00, 0xc0, 0xf0, 0xcf]);
    assert_eq!(board.read(BRIDGE, 0x24), [0x01, 0x00, 0xf1, 0xff]);
    assert_eq!(board.read(BRIDGE, 0x28), [4, 0, 0, 0, 7, 0, 0, 0]);
    let forwarding = board.bridge.forwarding();
    assert_eq!(forwarding.io, Some(0xc000..=0xcfff));
    assert_eq!(forwarding.memory[0], Some(0xc000_0000..=0xcfff_ffff));
    assert_eq!(forwarding.memory[1], Some(0x4_0000_0000..=0x7_ffff_ffff));
}

#[test]
fn an_empty_window_lets_nothing_through() {
    let none = Windows { secondary: 1, io: 0..0, memory: 0..0, prefetchable: 0..0 };
    let bridge = SlotBridge::new(1, &none, 0xd000_0000, Board::new().post);
    let Forwarding { io, memory, .. } = bridge.forwarding();
    assert_eq!((io, memory), (None, [None, None]));
}

#[test]
fn the_working_registers_show_through_configuration_space() {
    let board = Board::new();
    let at = capability_at(&board, id::SHPC);
    for (select, value) in [(0, 0), (3, 0xe001_0104), (9, 0x7f00_0d3f), (13, 0), (255, 0_u32)] {
        board.write(BRIDGE, at + 2, &[select]);
        assert_eq!(board.read(BRIDGE, at + 4), value.to_le_bytes(), "{select}");
    }
    board.write(BRIDGE, at + 2, &[8]);
    board.write(BRIDGE, at + 4, &[0]);
    assert_eq!(board.read(BRIDGE, at + 4), [0; 4]);
    assert_eq!(board.read(BRIDGE, at + 2), [8, 0, 0, 0, 0], "one read over select and data");
}

#[test]
fn an_event_asserts_intx_until_it_is_cleared() {
    let board = Board::new();
    listen(&board, false);
    board.bridge.touch(|shpc| shpc.press_button(0));
    assert!(board.lines[1].level(), "INTA of device 1 is the second line");
    assert_eq!(board.read(BRIDGE, STATUS), [0x18], "interrupt status, and capabilities");
    board.write(BRIDGE, COMMAND, &[7, 4]);
    assert!(!board.lines[1].level(), "INTx is disabled");
    board.write(BRIDGE, COMMAND, &[7, 0]);
    board.drive(FIRST_SLOT + 2, &[4]);
    assert!(!board.lines[1].level());
    assert_eq!(board.read(BRIDGE, STATUS), [0x10]);
}

#[test]
fn a_message_is_sent_at_each_rise_and_intx_is_quiet() {
    let board = Board::new();
    listen(&board, true);
    board.bridge.touch(|shpc| shpc.press_button(0));
    assert_eq!(board.post.take(), [Message { address: 0xfee0_0000, data: 0x31 }]);
    board.bridge.touch(|shpc| shpc.press_button(0));
    assert_eq!(board.post.take(), [], "it stands already");
    board.drive(SERR_INT, &[1]);
    assert_eq!(board.post.take(), [], "nothing is sent when it falls");
    board.drive(SERR_INT, &[0]);
    assert_eq!(board.post.take().len(), 1, "it rose again");
    assert!(!board.lines[1].level());
}

#[test]
fn no_message_is_sent_before_the_bridge_may_master_the_bus() {
    let board = Board::new();
    listen(&board, true);
    board.write(BRIDGE, COMMAND, &[3]);
    board.bridge.touch(|shpc| shpc.press_button(0));
    assert_eq!(board.post.take(), []);
    board.write(BRIDGE, COMMAND, &[7]);
    assert_eq!(board.post.take().len(), 1);
}

#[test]
fn a_slot_that_is_disabled_hides_and_resets_its_card() {
    let board = Board::new();
    let card = board.cold();
    board.start_card();
    assert_eq!(card.diary().placed.len(), 3);
    board.command(0x1f);
    assert_eq!(board.read(SLOT_1, 0), [0xff; 4]);
    let off = card.diary();
    assert!(off.placed.is_empty() && !off.master);
    assert_eq!(off.resets, 1);
    board.command(0x01);
    assert_eq!(board.read(SLOT_1, 0), [0xff; 4], "powered, but not on the bus");
    board.command(0x3a);
    assert_eq!(board.read(SLOT_1, 0), 0x1234_5678_u32.to_le_bytes());
    assert_eq!(board.read(SLOT_1, COMMAND), [0, 0], "as after power-on");
    assert_eq!(card.diary().resets, 1);
}

#[test]
fn changes_of_a_slot_are_told_with_what_was_and_what_is() {
    struct Told(AtomicU8, Mutex<Vec<(u8, SlotState, SlotState)>>);
    impl SlotEvents for Told {
        fn changed(&self, slot: u8, was: View, is: View) {
            self.0.fetch_add(1, Ordering::SeqCst);
            self.1.lock().unwrap().push((slot, was.state, is.state));
        }

        fn told(&self) {
            unreachable!("the block was left alone");
        }
    }
    let board = Board::new();
    board.cold();
    let told = Arc::new(Told(AtomicU8::new(0), Mutex::default()));
    board.bridge.report_to(told.clone());
    board.command(0x1f);
    board.command(0x1f);
    board.drive(SERR_INT, &[0; 4]);
    assert_eq!(*told.1.lock().unwrap(), [(0, SlotState::Enabled, SlotState::Disabled)]);
}

#[test]
fn an_interrupt_that_stands_stands_where_the_guest_arrives() {
    for msi in [false, true] {
        let (from, to) = (Board::new(), Board::new());
        listen(&from, msi);
        from.bridge.touch(|shpc| shpc.press_button(0));
        load(&*to.bridge, &saved(&*from.bridge)).unwrap();
        assert_eq!(to.lines[1].level(), !msi);
        assert_eq!(to.post.take().len(), usize::from(msi));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_guest_is_withstood(
        steps in prop::collection::vec(
            (0u8..3, 0u16..0x110, prop::collection::vec(any::<u8>(), 1..9)), 0..64),
    ) {
        let board = Board::new();
        board.cold();
        for (what, at, data) in &steps {
            match what {
                0 => board.write(BRIDGE, *at, data),
                1 => drop(board.bridge.write_bar(0, u64::from(at % 0x40), data)),
                _ => board.write(SLOT_1, *at, data),
            }
        }
        let state = saved(&*board.bridge);
        let twin = Board::new();
        twin.cold();
        load(&*twin.bridge, &state).unwrap();
        prop_assert_eq!(saved(&*twin.bridge), state);
        assert_refuses_junk(&*board.bridge);
    }
}
