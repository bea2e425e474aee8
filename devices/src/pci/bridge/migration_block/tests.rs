//! The block as its driver finds it.

use migration::state::testing::{assert_refuses_junk, load, saved};

use super::*;
use crate::pci::capability;
use crate::pci::registers::{COMMAND, STATUS as PCI_STATUS, status};
use crate::pci::testing::{BRIDGE, Board};
use crate::pci::{PciFunction, bridge::SlotBridge};

const MSI_AT: u16 = 0x40;
/// SERR-INT of the controller: all masks taken away, but for slots.
const SERR_INT: u64 = 0x20;
const FIRST_SLOT: u64 = 0x24;

struct Bench {
    board: Board,
    at: u16,
}

impl std::ops::Deref for Bench {
    type Target = SlotBridge;

    fn deref(&self) -> &SlotBridge {
        &self.board.bridge
    }
}

impl Bench {
    fn new() -> Self {
        let board = Board::new();
        let chain = capability::walk(|at| board.read::<1>(BRIDGE, at)[0]);
        let at = chain.iter().find(|(id, _)| *id == id::VENDOR).expect("it is in the chain").1;
        Self { board, at }
    }

    /// With a driver of the block, and MSI if `msi`.
    fn driven(msi: bool) -> Self {
        let bench = Self::new();
        bench.listen(msi);
        bench
    }

    fn listen(&self, msi: bool) {
        if msi {
            self.board.write(BRIDGE, MSI_AT + 4, &0xfee0_0000_u32.to_le_bytes());
            self.board.write(BRIDGE, MSI_AT + 2, &[1, 0]);
        }
        self.board.write(BRIDGE, COMMAND, &[7]);
        self.write(CONTROL, INTERRUPT_ENABLE);
    }

    fn read(&self, register: u16) -> u32 {
        u32::from_le_bytes(self.board.read(BRIDGE, self.at + register))
    }

    fn write(&self, register: u16, value: u32) {
        self.board.write(BRIDGE, self.at + register, &value.to_le_bytes());
    }

    fn line(&self) -> bool {
        self.board.lines[1].level()
    }

    fn messages(&self) -> usize {
        self.board.post.take().len()
    }
}

#[test]
fn a_driver_recognises_it_by_its_signature() {
    let bench = Bench::new();
    let head: [u8; 8] = bench.board.read(BRIDGE, bench.at);
    assert_eq!(head, [0x09, 0, 0x20, 1, b'u', b'v', b'm', b'm']);
    assert_eq!(bench.read(CAPABILITIES), 3, "dirtying and pause");
    assert_eq!([STATUS, CONTROL, ASKED, PAUSED, UNABLE].map(|at| bench.read(at)), [0; 5]);
    assert_eq!(bench.block(), BlockView::default());
}

#[test]
fn the_guest_writes_what_is_its_own_and_nothing_else() {
    let bench = Bench::new();
    bench.want_dirtying(true);
    bench.board.bridge.ask_to_pause(0b101);
    for register in (0..LENGTH).step_by(4) {
        bench.write(register, u32::MAX);
    }
    let all: Vec<u32> = (0..LENGTH).step_by(4).map(|at| bench.read(at)).collect();
    let head = u32::from_le_bytes([0x09, 0, 0x20, 1]);
    let (signature, slots) = (u32::from_le_bytes(*b"uvmm"), 0b1111);
    assert_eq!(all, [head, signature, 3, 3, 0x8000_0007, 0b101, slots, slots]);
}

#[test]
fn a_bridge_of_all_slots_has_a_bit_for_each() {
    let windows =
        crate::pci::bridge::Windows { secondary: 1, io: 0..0, memory: 0..0, prefetchable: 0..0 };
    let bridge = SlotBridge::new(31, &windows, 0xd000_0000, Board::new().post);
    let at = Bench::new().at;
    let _ = bridge.write_config(at + PAUSED, &[0xff; 4]);
    assert_eq!(bridge.block().paused, 0x7fff_ffff);
}

#[test]
fn what_the_guest_promises_shows() {
    let bench = Bench::new();
    let with = |control| {
        bench.write(CONTROL, control);
        let BlockView { dirtying_active, can_pause, dirtying_began, .. } = bench.block();
        [dirtying_active, can_pause, dirtying_began]
    };
    assert_eq!(with(1), [true, false, false]);
    assert_eq!(with(2), [false, true, false]);
    assert_eq!(with(4), [false, false, true]);
    assert_eq!(with(INTERRUPT_ENABLE), [false; 3]);
}

#[test]
fn a_wish_asserts_intx_until_the_guest_clears_the_event() {
    let bench = Bench::driven(false);
    bench.want_dirtying(true);
    assert_eq!(bench.read(STATUS), EVENT | 1);
    assert!(bench.line());
    assert_eq!(bench.board.read(BRIDGE, PCI_STATUS), [0x18], "interrupt status, capabilities");
    bench.write(STATUS, 1);
    assert!(bench.line(), "only a one at the event clears it");
    bench.write(STATUS, EVENT);
    assert_eq!(bench.read(STATUS), 1, "what is wanted is wanted still");
    assert!(!bench.line());
    bench.want_dirtying(false);
    assert_eq!(bench.read(STATUS), EVENT);
    assert!(bench.line());
}

#[test]
fn an_event_without_a_driver_disturbs_nobody() {
    for msi in [false, true] {
        let bench = Bench::driven(msi);
        bench.write(CONTROL, 0);
        bench.want_dirtying(true);
        bench.board.bridge.ask_to_pause(1);
        assert!(!bench.line());
        assert_eq!(bench.messages(), 0);
        let [low, _]: [u8; 2] = bench.board.read(BRIDGE, PCI_STATUS);
        assert_eq!(u16::from(low) & status::INTERRUPT, 0);
        bench.write(CONTROL, INTERRUPT_ENABLE);
        assert_eq!(bench.line(), !msi, "a driver that comes later hears of it");
        assert_eq!(bench.messages(), usize::from(msi));
    }
}

#[test]
fn a_message_is_sent_for_each_event() {
    let bench = Bench::driven(true);
    bench.want_dirtying(true);
    assert_eq!(bench.messages(), 1);
    bench.board.bridge.ask_to_pause(1);
    assert_eq!(bench.messages(), 0, "the event stands already");
    bench.write(STATUS, EVENT);
    assert_eq!(bench.messages(), 0);
    bench.board.bridge.let_resume();
    assert_eq!(bench.messages(), 1);
    assert!(!bench.line(), "INTx is quiet");
}

#[test]
fn an_event_that_stands_does_not_swallow_what_the_slots_have_to_tell() {
    let bench = Bench::driven(true);
    bench.want_dirtying(true);
    assert_eq!(bench.messages(), 1);
    bench.board.drive(SERR_INT, &[0; 4]);
    bench.board.drive(FIRST_SLOT, &[0; 4]);
    bench.touch(|shpc| shpc.press_button(0));
    assert_eq!(bench.messages(), 1, "the button");
    bench.board.drive(SERR_INT, &[1]);
    bench.board.drive(SERR_INT, &[0]);
    assert_eq!(bench.messages(), 1, "shpchp masked and unmasked");
    bench.write(STATUS, EVENT);
    bench.want_dirtying(false);
    assert_eq!(bench.messages(), 1, "nor does the button swallow an event");
}

#[test]
fn the_line_rests_once_neither_slots_nor_block_need_it() {
    let bench = Bench::driven(false);
    bench.board.drive(SERR_INT, &[0; 4]);
    bench.board.drive(FIRST_SLOT, &[0; 4]);
    bench.want_dirtying(true);
    bench.touch(|shpc| shpc.press_button(0));
    bench.write(STATUS, EVENT);
    assert!(bench.line(), "the button");
    bench.want_dirtying(false);
    bench.board.drive(FIRST_SLOT + 2, &[4]);
    assert!(bench.line(), "the event");
    bench.write(STATUS, EVENT);
    assert!(!bench.line());
}

#[test]
fn a_pause_is_answered_when_each_slot_asked_is() {
    let bench = Bench::driven(false);
    bench.write(PAUSED, 0b1000);
    bench.write(UNABLE, 0b0100);
    bench.board.bridge.ask_to_pause(0b111);
    assert!(bench.line());
    assert_eq!(bench.read(STATUS), EVENT | PAUSE);
    assert_eq!([ASKED, PAUSED, UNABLE].map(|at| bench.read(at)), [0b111, 0, 0]);
    assert!(bench.block().wants_pause && !bench.block().is_answered());
    bench.write(PAUSED, 0b101);
    assert!(!bench.block().is_answered());
    bench.write(UNABLE, 0b010);
    assert!(bench.block().is_answered());
    let BlockView { asked, paused, unable, .. } = bench.block();
    assert_eq!((asked, paused, unable), (0b111, 0b101, 0b010));
}

#[test]
fn a_resume_is_done_when_the_guest_says_that_nothing_is_paused() {
    let bench = Bench::driven(false);
    bench.board.bridge.ask_to_pause(0b11);
    bench.write(PAUSED, 0b11);
    bench.write(STATUS, EVENT);
    bench.board.bridge.let_resume();
    assert!(bench.line());
    assert_eq!(bench.read(STATUS), EVENT);
    assert!(!bench.block().is_resumed());
    bench.write(PAUSED, 0b01);
    assert_eq!(bench.read(ASKED), 0b11, "one is still paused");
    bench.write(PAUSED, 0);
    assert_eq!(bench.read(ASKED), 0);
    assert!(bench.block().is_resumed());
}

#[test]
fn a_resume_while_the_guest_still_pauses_is_not_done_before_it_says_so() {
    let bench = Bench::driven(false);
    bench.board.bridge.ask_to_pause(1);
    bench.write(PAUSED, 0);
    assert_eq!(bench.read(ASKED), 1, "it has paused nothing yet, and is asked still");
    bench.board.bridge.let_resume();
    assert!(!bench.block().is_resumed(), "it may be about to pause");
    bench.write(PAUSED, 1);
    assert!(!bench.block().is_resumed());
    bench.write(PAUSED, 0);
    assert!(bench.block().is_resumed());
}

#[test]
fn a_promise_that_was_broken_stays_so_until_it_is_wanted_anew() {
    let bench = Bench::new();
    bench.want_dirtying(true);
    bench.write(CONTROL, 1);
    assert!(!bench.block().promise_is_kept(), "it has not begun");
    bench.write(CONTROL, 1 | 4);
    assert!(bench.block().promise_is_kept());
    bench.write(CONTROL, 4);
    bench.write(CONTROL, 1 | 4);
    assert!(bench.block().broken && !bench.block().promise_is_kept());
    bench.want_dirtying(true);
    assert!(bench.block().promise_is_kept());
    bench.want_dirtying(false);
    bench.write(CONTROL, 1);
    assert!(!bench.block().broken, "it need not be kept for ever");
}

#[test]
fn nothing_is_left_of_it_after_a_reset() {
    let bench = Bench::driven(false);
    bench.want_dirtying(true);
    bench.board.bridge.ask_to_pause(1);
    bench.write(CONTROL, u32::MAX);
    bench.write(PAUSED, 1);
    bench.write(UNABLE, 2);
    bench.reset();
    assert_eq!(bench.block(), BlockView::default());
    assert_eq!(bench.read(STATUS), 0, "nor the event");
    assert!(!bench.line());
    assert_eq!(bench.read(SIGNATURE_AT), SIGNATURE);
}

#[test]
fn the_guest_finds_it_the_same_where_it_arrives() {
    for msi in [false, true] {
        let (from, to) = (Bench::driven(msi), Bench::new());
        from.write(CONTROL, u32::MAX);
        from.want_dirtying(true);
        from.board.bridge.ask_to_pause(0b11);
        from.write(PAUSED, 1);
        from.write(UNABLE, 2);
        load(&*to.board.bridge, &saved(&*from.board.bridge)).unwrap();
        assert_eq!(to.block(), from.block());
        assert_eq!(to.line(), !msi, "an event that stood stands there");
        assert_eq!(to.messages(), usize::from(msi));
        to.board.bridge.let_resume();
        to.write(PAUSED, 0);
        assert!(to.block().is_resumed());
    }
}

#[test]
fn a_state_that_no_bridge_like_it_has_is_refused() {
    let bench = Bench::driven(false);
    bench.board.bridge.ask_to_pause(1);
    assert_refuses_junk(&*bench.board.bridge);
    let mut registers = bench.board.bridge.lock().registers.clone();
    for (register, value) in [
        (SIGNATURE_AT, SIGNATURE ^ 1),
        (CAPABILITIES, 0),
        (STATUS, 1 << 3),
        (CONTROL, 1 << 3),
        (ASKED, 1 << 4),
        (PAUSED, 1 << 31),
    ] {
        let mut other = registers.clone();
        other.set(bench.at + register, value);
        assert!(registers.load(&other.save()).is_err(), "{register:#x}");
    }
}
