//! The clock against a host whose time the test decides.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use migration::state::testing::assert_round_trip;
use proptest::prelude::*;

use super::*;
use crate::legacy::testing::{Wire, accesses, get, wire, withstands};

const START: i64 = 951_831_296; // 2000-02-29 13:34:56
const AIE: u8 = AF;
const UIE: u8 = UF;
const HOURS_24: u8 = B_AT_START;

struct Shelf {
    rtc: Rtc,
    wire: Arc<Wire>,
    micros: Arc<AtomicI64>,
    changes: Arc<AtomicU32>,
}

fn shelf() -> Shelf {
    let micros = Arc::new(AtomicI64::new(START * SECOND_MICROS));
    let (wire, changes) = (wire(), Arc::new(AtomicU32::new(0)));
    let (clock, counter) = (Arc::clone(&micros), Arc::clone(&changes));
    let rtc = Rtc::with_clock(
        wire.clone(),
        move || {
            counter.fetch_add(1, Ordering::SeqCst);
        },
        move || clock.load(Ordering::SeqCst),
    );
    Shelf { rtc, wire, micros, changes }
}

impl Shelf {
    fn pass(&self, time: Duration) {
        let micros = i64::try_from(time.as_micros()).unwrap();
        self.micros.fetch_add(micros, Ordering::SeqCst);
    }

    fn read(&self, register: u8) -> u8 {
        self.rtc.write(0, &[register]);
        get(&self.rtc, 1)
    }

    fn write(&self, register: u8, value: u8) {
        self.rtc.write(0, &[register]);
        self.rtc.write(1, &[value]);
    }

    fn time(&self) -> Fields {
        [0, 2, 4, 6, 7, 8, 9, CENTURY].map(|register| self.read(register))
    }

    fn set_time(&self, fields: Fields) {
        self.write(B, SET | HOURS_24);
        for (register, value) in [0, 2, 4, 6, 7, 8, 9, CENTURY].into_iter().zip(fields) {
            self.write(register, value);
        }
        self.write(B, HOURS_24);
    }
}

#[test]
fn it_shows_the_time_of_the_host() {
    let shelf = shelf();
    assert_eq!(shelf.time(), [0x56, 0x34, 0x13, 3, 0x29, 0x02, 0x00, 0x20]);
    shelf.pass(Duration::from_secs(4));
    assert_eq!(shelf.time()[..2], [0x00, 0x35]);
    assert_eq!(shelf.read(D), VRT);
}

#[test]
fn a_clock_that_was_set_runs_on_from_there() {
    let shelf = shelf();
    shelf.set_time([0x58, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19]);
    assert_eq!(shelf.time(), [0x58, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19]);
    shelf.pass(Duration::from_secs(3));
    assert_eq!(shelf.time(), [0x01, 0x00, 0x00, 7, 0x01, 0x01, 0x00, 0x20]);
}

#[test]
fn a_clock_that_is_being_set_stands_still() {
    let shelf = shelf();
    let before = shelf.time();
    shelf.write(B, SET | HOURS_24);
    shelf.pass(Duration::from_secs(100));
    assert_eq!(shelf.time(), before);
    assert_eq!(shelf.read(A) & UIP, 0);
    assert_eq!(shelf.read(C), 0, "no update ended");
}

#[test]
fn a_date_that_does_not_exist_leaves_the_time_as_it_was() {
    let shelf = shelf();
    let before = shelf.time();
    shelf.set_time([0, 0, 0, 0, 0x31, 0x02, 0x00, 0x20]);
    assert_eq!(shelf.time(), before);
    shelf.write(0, 0x77);
    assert_eq!(shelf.time(), before);
}

#[test]
fn an_update_is_announced_before_the_second_changes() {
    let shelf = shelf();
    assert_eq!(shelf.read(A), A_AT_START);
    shelf.pass(Duration::from_micros(998_500));
    assert_eq!(shelf.read(A), A_AT_START | UIP);
    shelf.pass(Duration::from_micros(1_500));
    assert_eq!(shelf.read(A), A_AT_START);
    shelf.write(A, 0xff);
    assert_eq!(shelf.read(A), 0x7f);
}

#[test]
fn the_ram_keeps_its_bytes_and_the_index_ignores_the_nmi_bit() {
    let shelf = shelf();
    for register in (0x0e..0x80).filter(|register| *register != CENTURY) {
        shelf.write(register | NMI_DISABLE, register);
    }
    for register in (0x0e..0x80).filter(|register| *register != CENTURY) {
        assert_eq!(shelf.read(register), register);
    }
    assert_eq!(get(&shelf.rtc, 0), 0xff);
}

#[test]
fn index_and_data_may_come_in_one_access() {
    let shelf = shelf();
    shelf.rtc.write(0, &[0x40, 0x5a]);
    let mut both = [0xff; 2];
    shelf.rtc.read(0, &mut both);
    assert_eq!(both, [0xff, 0x5a]);
}

#[test]
fn an_alarm_interrupts_at_its_time_until_register_c_is_read() {
    let shelf = shelf();
    for (register, value) in [(1, 0x06), (3, 0x35), (5, 0x13), (B, HOURS_24 | AIE)] {
        shelf.write(register, value);
    }
    let due = shelf.rtc.poll().unwrap();
    assert_eq!(due, Duration::from_secs(10));
    shelf.pass(due - Duration::from_micros(1));
    assert_eq!(shelf.rtc.poll(), Some(Duration::from_micros(1)));
    assert!(!shelf.wire.level());
    shelf.pass(Duration::from_micros(1));
    assert_eq!(shelf.rtc.poll(), None);
    assert!(shelf.wire.level());
    let changes = shelf.changes.load(Ordering::SeqCst);
    assert_eq!(shelf.read(C), IRQF | AF | UF);
    assert!(!shelf.wire.level());
    assert!(shelf.changes.load(Ordering::SeqCst) > changes);
    assert_eq!(shelf.read(C), 0);
    assert_eq!(shelf.rtc.poll(), Some(Duration::from_secs(86_400)));
}

#[test]
fn bytes_that_match_anything_make_an_alarm_every_minute() {
    let shelf = shelf();
    for (register, value) in [(1, 0x10), (3, 0xff), (5, 0xc0), (B, HOURS_24 | AIE)] {
        shelf.write(register, value);
    }
    assert_eq!(shelf.rtc.poll(), Some(Duration::from_secs(14)));
    for (register, value) in [(1, 0xc0), (5, 0x12)] {
        shelf.write(register, value);
    }
    let until_noon = 22 * 3600 + 25 * 60 + 4;
    assert_eq!(shelf.rtc.poll(), Some(Duration::from_secs(until_noon)));
}

#[test]
fn an_alarm_that_no_time_matches_is_never_due() {
    let shelf = shelf();
    for (register, value) in [(1, 0x60), (3, 0xff), (5, 0xff), (B, HOURS_24 | AIE)] {
        shelf.write(register, value);
    }
    assert_eq!(shelf.rtc.poll(), None);
}

#[test]
fn updates_interrupt_every_second_if_enabled() {
    let shelf = shelf();
    shelf.pass(Duration::from_micros(400_000));
    shelf.write(B, HOURS_24 | UIE);
    assert_eq!(shelf.rtc.poll(), Some(Duration::from_micros(600_000)));
    shelf.pass(Duration::from_micros(600_000));
    shelf.rtc.poll();
    assert!(shelf.wire.level());
    shelf.write(B, HOURS_24);
    assert!(!shelf.wire.level(), "disabled, but still flagged");
    assert_eq!(shelf.read(C), UF);
}

#[test]
fn an_alarm_that_passed_while_the_guest_moved_is_not_lost() {
    let [from, to] = [shelf(), shelf()];
    from.set_time([0x00, 0x00, 0x12, 1, 0x01, 0x01, 0x30, 0x20]);
    for (register, value) in [(1, 0x05), (3, 0x00), (5, 0x12), (B, HOURS_24 | AIE)] {
        from.write(register, value);
    }
    assert_round_trip(&from.rtc, &to.rtc);
    to.pass(Duration::from_secs(7));
    assert!(!to.wire.level());
    assert_eq!(to.rtc.poll(), None);
    assert!(to.wire.level());
    assert_eq!(to.time()[..3], [0x07, 0x00, 0x12]);
}

#[test]
fn an_interrupt_that_nobody_acknowledged_moves_with_the_guest() {
    let [from, to] = [shelf(), shelf()];
    from.write(B, HOURS_24 | UIE);
    from.pass(Duration::from_secs(1));
    from.rtc.poll();
    assert_round_trip(&from.rtc, &to.rtc);
    assert!(to.wire.level());
    assert_eq!(to.read(C), IRQF | UF);
    assert!(!to.wire.level());
}

#[test]
fn the_clock_of_the_host_may_go_back() {
    let shelf = shelf();
    shelf.micros.fetch_sub(3600 * SECOND_MICROS, Ordering::SeqCst);
    assert_eq!(shelf.time()[2], 0x12);
    assert_eq!(shelf.read(C), 0);
    shelf.pass(Duration::from_secs(1));
    assert_eq!(shelf.read(C), UF);
}

proptest! {
    #[test]
    fn any_guest_is_withstood(
        registers in prop::collection::vec((any::<u8>(), any::<u8>()), 0..32),
        accesses in accesses(SIZE),
        seconds in 0u64..1_000_000,
    ) {
        let shelf = shelf();
        for (register, value) in registers {
            shelf.write(register, value);
        }
        shelf.pass(Duration::from_secs(seconds));
        shelf.rtc.poll();
        withstands(&shelf.rtc, &self::shelf().rtc, &accesses);
        shelf.time();
        shelf.rtc.poll();
    }
}
