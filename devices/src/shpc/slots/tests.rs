//! Cards that come and go, with a guest that does what Linux does.

use std::time::Duration;

use super::*;
use crate::pci::testing::{BRIDGE, Board, Card, SLOT_1};

const SERR_INT: u64 = 0x20;
const SLOT: u64 = 0x24;
/// What Linux does to a slot once its five seconds are over (drivers/pci/hotplug/shpchp_ctrl.c).
const TAKES: [u8; 3] = [0x01, 0x3a, 0x04];
const LETS_GO: [u8; 2] = [0x1f, 0x30];

struct Bench {
    board: Board,
    slots: Arc<Slots>,
}

fn bench() -> Bench {
    let board = Board::new();
    let slots = Slots::new(board.topology.clone(), board.bridge.clone(), board.behind);
    Bench { board, slots }
}

impl Bench {
    fn listening() -> Self {
        let bench = bench();
        bench.board.drive(SERR_INT, &[0; 4]);
        bench.board.drive(SLOT, &[0; 4]);
        bench
    }

    /// The guest hears the button, as its interrupt tells, and answers it.
    fn hears(&self) {
        let mut register = [0; 4];
        self.board.mmio.read(crate::pci::testing::WORKING_REGISTERS + SLOT, &mut register);
        assert_eq!(register[2] & 4, 4, "nobody pressed the button");
        self.board.drive(SLOT, &register);
        self.commands(&[0x08, 0x30]);
    }

    fn commands(&self, codes: &[u8]) {
        codes.iter().for_each(|code| self.board.command(*code));
    }

    fn progress(&self) -> Progress {
        self.slots.status(1).unwrap().request.expect("something was wished").1
    }
}

#[test]
fn a_card_is_plugged_once_the_guest_took_it() {
    let bench = Bench::listening();
    let card = Card::new();
    bench.slots.plug(1, card).unwrap();
    assert_eq!(bench.progress(), Progress::Asked);
    assert_eq!(bench.board.read(SLOT_1, 0), [0xff; 4], "it has no power yet");
    bench.hears();
    assert_eq!(bench.progress(), Progress::Accepted);
    bench.commands(&TAKES[..2]);
    assert_eq!(bench.board.read(SLOT_1, 0), 0x1234_5678_u32.to_le_bytes());
    bench.commands(&TAKES[2..]);
    assert_eq!(bench.progress(), Progress::Done);
}

#[test]
fn a_card_comes_out_once_the_guest_let_go_and_can_come_back() {
    let bench = Bench::listening();
    let card = Card::new();
    bench.slots.insert_cold(1, card.clone()).unwrap();
    bench.board.start_card();
    for _ in 0..20 {
        bench.slots.ask_back(1).unwrap();
        assert_eq!(bench.slots.take_out(1).err(), Some(SlotError::InUse(1)));
        bench.hears();
        bench.commands(&LETS_GO);
        assert_eq!(bench.progress(), Progress::Done);
        drop(bench.slots.take_out(1).unwrap());
        assert_eq!(Arc::strong_count(&card), 1, "something is left behind");
        assert!(card.diary().placed.is_empty());
        assert_eq!(bench.slots.free(), Some(1));

        bench.board.drive(SLOT, &[0, 0, 0xff, 0]);
        bench.slots.plug(1, card.clone()).unwrap();
        bench.hears();
        bench.commands(&TAKES);
        assert_eq!(bench.progress(), Progress::Done);
        bench.board.start_card();
        assert_eq!(card.diary().placed.len(), 3);
    }
}

#[test]
fn a_guest_that_switches_a_slot_off_and_on_keeps_its_card() {
    let bench = Bench::listening();
    bench.slots.insert_cold(1, Card::new()).unwrap();
    bench.commands(&LETS_GO);
    assert_eq!(bench.board.read(SLOT_1, 0), [0xff; 4]);
    bench.commands(&TAKES);
    assert_eq!(bench.board.read(SLOT_1, 0), 0x1234_5678_u32.to_le_bytes());
    bench.commands(&LETS_GO);
    bench.slots.ask_back(1).unwrap();
    assert_eq!(bench.progress(), Progress::Done, "it has no power already");
    bench.slots.take_out(1).unwrap();
}

#[test]
fn a_card_that_the_guest_refuses_is_taken_out_again() {
    let bench = Bench::listening();
    let card = Card::new();
    bench.slots.plug(1, card.clone()).unwrap();
    bench.hears();
    bench.commands(&[0x01, 0x3a, 0x1f]);
    assert_eq!(bench.progress(), Progress::Refused);
    drop(bench.slots.take_out(1).unwrap());
    assert_eq!(Arc::strong_count(&card), 1);
}

#[test]
fn a_wish_that_is_given_up_in_time_is_withdrawn_by_a_second_press() {
    let bench = Bench::listening();
    bench.slots.insert_cold(1, Card::new()).unwrap();
    bench.slots.ask_back(1).unwrap();
    bench.hears();
    assert_eq!(bench.slots.ask_back(1), Err(SlotError::Busy(1)));
    bench.slots.give_up(1).unwrap();
    let mut latches = [0];
    bench.board.mmio.read(crate::pci::testing::WORKING_REGISTERS + SLOT + 2, &mut latches);
    assert_eq!(latches[0] & 4, 4, "pressed again");
    assert_eq!(bench.slots.status(1).unwrap().request, None);
}

#[test]
fn what_cannot_be_asked_is_refused_and_nothing_happens() {
    let bench = bench();
    assert_eq!(bench.slots.plug(1, Card::new()), Err(SlotError::Deaf(1)));
    assert_eq!(bench.slots.plug(0, Card::new()), Err(SlotError::NoSlot(0)));
    assert_eq!(bench.slots.plug(5, Card::new()), Err(SlotError::NoSlot(5)));
    assert_eq!(bench.slots.ask_back(1), Err(SlotError::Empty(1)));
    assert_eq!(bench.slots.take_out(1).err(), Some(SlotError::Empty(1)));
    bench.slots.insert_cold(1, Card::new()).unwrap();
    assert_eq!(bench.slots.insert_cold(1, Card::new()), Err(SlotError::Taken(1)));
    assert_eq!(bench.slots.ask_back(1), Err(SlotError::Deaf(1)));
    assert_eq!(bench.slots.plug(1, Card::new()), Err(SlotError::Taken(1)));
    assert_eq!(bench.slots.free(), Some(2));
}

#[test]
fn who_waits_is_woken_by_the_guest_or_by_the_clock() {
    let bench = Bench::listening();
    bench.slots.insert_cold(1, Card::new()).unwrap();
    let seen = bench.slots.changes();
    let soon = Instant::now() + Duration::from_millis(5);
    assert_eq!(bench.slots.wait(seen, soon), seen);
    std::thread::scope(|scope| {
        let late = Instant::now() + Duration::from_secs(60);
        scope.spawn(|| bench.commands(&[0x08]));
        assert_ne!(bench.slots.wait(seen, late), seen);
    });
}

#[test]
fn slots_are_paused_by_their_numbers_and_who_waits_hears_the_answer() {
    const BLOCK: u16 = 0x5c;
    let bench = bench();
    assert_eq!(bench.slots.ask_to_pause(&[1, 5]), Err(SlotError::NoSlot(5)));
    assert!(!bench.slots.block().wants_pause);
    bench.slots.ask_to_pause(&[1, 3]).unwrap();
    assert_eq!(bench.slots.block().asked, 0b101);
    assert_eq!(bench.slots.mask(&[3]), Ok(0b100));
    let seen = bench.slots.changes();
    std::thread::scope(|scope| {
        let late = Instant::now() + Duration::from_secs(60);
        scope.spawn(|| bench.board.write(BRIDGE, BLOCK + 0x18, &[0b101]));
        assert_ne!(bench.slots.wait(seen, late), seen);
    });
    assert!(bench.slots.block().is_answered());
    let seen = bench.slots.changes();
    bench.board.write(BRIDGE, BLOCK - 1, &[0]);
    assert_eq!(bench.slots.changes(), seen, "that was not to the block");
    bench.slots.want_dirtying(true);
    bench.slots.let_resume();
    assert!(bench.slots.block().wants_dirtying && !bench.slots.block().wants_pause);
}
