//! Asking, with a guest that does to the registers what Linux does.

use std::sync::Mutex;

use devices::bus::Bus;
use devices::irq::{Line, Message, Messages, Vector};
use devices::pci::bridge::{SlotBridge, Windows};
use devices::pci::topology::{Place, ROOT, Surroundings, Topology};
use devices::pci::{Bar, Effect};
use migration::state::{Migratable, StateError, StateReader, StateWriter};

use super::*;

const REGISTERS: u64 = 0xd000_0000;
const COMMAND: u64 = 0x14;
const SERR_INT: u64 = 0x20;
const SLOT: u64 = 0x24;
/// What Linux does when it hears the button, and then (drivers/pci/hotplug/shpchp_ctrl.c).
const HEARS: [u8; 2] = [0x08, 0x30];
const TAKES: [u8; 3] = [0x01, 0x3a, 0x04];
const LETS_GO: [u8; 2] = [0x1f, 0x30];
const FAILS: [u8; 3] = [0x01, 0x3a, 0x1f];
const KEEPS: [u8; 2] = [0x04, 0x30];

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

/// Interrupts that nobody hears: this guest looks by itself.
struct Unheard;

impl Line for Unheard {
    fn set(&self, _: bool) {}
}

impl Messages for Unheard {
    fn send(&self, _: Message) {}

    fn vector(&self) -> std::io::Result<Box<dyn Vector>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// A function that has nothing but a place.
struct Bare;

impl Migratable for Bare {
    fn save(&self, _: &mut StateWriter) -> Result<(), StateError> {
        Ok(())
    }

    fn load(&self, _: &mut StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl PciFunction for Bare {
    fn read_config(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _: u16, _: &[u8]) -> Effect {
        Effect::None
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn read_bar(&self, _: u8, _: u64, _: &mut [u8]) {}

    fn write_bar(&self, _: u8, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }

    fn place_bar(&self, _: u8, _: Option<u64>) {}

    fn allow_bus_master(&self, _: bool) {}

    fn wire(&self, _: Arc<dyn Line>) {}

    fn reset(&self) {}
}

/// A machine whose guest listens at the first of its slots.
struct Bench {
    mmio: Arc<Bus>,
    _pio: Arc<Bus>,
    slots: Arc<Slots>,
    cancel: AtomicBool,
}

impl Bench {
    fn new() -> Self {
        let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let topology = Topology::new(Surroundings {
            pio: Arc::downgrade(&pio),
            mmio: Arc::downgrade(&mmio),
            io_windows: Vec::new(),
            memory_windows: Vec::from([0xc000_0000..0xd800_0000, 0xd800_0000..0xe000_0000]),
            lines: Vec::from([Arc::new(Unheard) as Arc<dyn Line>]),
        });
        let windows = Windows {
            secondary: 1,
            io: 0xc000..0xd000,
            memory: 0xc000_0000..REGISTERS,
            prefetchable: 0x4_0000_0000..0x8_0000_0000,
        };
        let bridge = SlotBridge::new(2, &windows, REGISTERS, Arc::new(Unheard));
        let behind = topology.insert_bridge(Place::new(ROOT, 1, 0), bridge.clone()).unwrap();
        let slots = Slots::new(topology, bridge, behind);
        let bench = Self { mmio, _pio: pio, slots, cancel: AtomicBool::new(false) };
        bench.drive(SERR_INT, &[0; 4]);
        bench.drive(SLOT, &[0; 4]);
        bench
    }

    fn drive(&self, register: u64, data: &[u8]) {
        assert!(self.mmio.write(REGISTERS + register, data), "nobody answers");
    }

    /// Waits for a press of the button, and then gives `commands`.
    fn answer(&self, commands: &[u8]) {
        let mut register = [0; 4];
        while register[2] & 4 == 0 {
            self.mmio.read(REGISTERS + SLOT, &mut register);
            thread::sleep(Duration::from_millis(1));
        }
        self.drive(SLOT, &register);
        for command in commands {
            self.drive(COMMAND, &[*command, 1]);
            // So slowly that everybody sees each of them.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Does `work` with the first slot, while the guest answers with `commands`.
    fn with_guest<R>(
        &self,
        commands: &[&[u8]],
        limit: Duration,
        work: impl FnOnce(Asking<'_>) -> R,
    ) -> (R, Vec<SlotStage>) {
        let stages = Mutex::new(Vec::new());
        let mut tell = |progress: SlotProgress| stages.lock().unwrap().push(progress.stage);
        let commands = commands.concat();
        let result = thread::scope(|scope| {
            if !commands.is_empty() {
                scope.spawn(|| self.answer(&commands));
            }
            let deadline = Instant::now() + limit;
            work(Asking::new(&self.slots, 1, deadline, &self.cancel, &mut tell))
        });
        (result, stages.into_inner().unwrap())
    }

    fn plug(&self, card: &Arc<Bare>, commands: &[&[u8]], limit: Duration) -> Plugged {
        self.with_guest(commands, limit, |asking| put_in(asking, card.clone()))
    }

    fn has_card(&self) -> bool {
        self.slots.status(1).unwrap().view.card
    }
}

type Plugged = (Result<(), (Error, Left)>, Vec<SlotStage>);

#[test]
fn a_device_goes_in_and_out_step_by_step_and_is_gone_when_that_is_told() {
    let bench = Bench::new();
    for _ in 0..3 {
        let card = Arc::new(Bare);
        let (result, stages) = bench.plug(&card, &[&HEARS, &TAKES], LONG);
        result.unwrap();
        assert_eq!(
            stages,
            [SlotStage::Asked, SlotStage::Accepted, SlotStage::Powered, SlotStage::Enabled]
        );
        let watch = Arc::downgrade(&card);
        drop(card);
        let (result, stages) = bench.with_guest(&[&HEARS, &LETS_GO], LONG, ask_back);
        result.unwrap();
        assert_eq!(stages, [SlotStage::Asked, SlotStage::Accepted, SlotStage::Released]);
        assert_eq!(watch.strong_count(), 0);
        assert!(!bench.has_card());
        bench.drive(SLOT, &[0, 0, 0xff, 0]);
    }
}

#[test]
fn a_device_that_the_guest_refuses_is_taken_out_again() {
    let (bench, card) = (Bench::new(), Arc::new(Bare));
    // The last hold on it must be the slot's, as it is for devices of the host.
    let weak = Arc::downgrade(&card);
    let (result, stages) = bench
        .with_guest(&[&HEARS, &FAILS], LONG, |asking| put_in(asking, card as Arc<dyn PciFunction>));
    assert!(matches!(result, Err((Error::Refused(1), Left::Nothing))), "{result:?}");
    assert_eq!(stages.last(), Some(&SlotStage::Refused));
    assert_eq!(weak.strong_count(), 0);
    assert!(!bench.has_card());
}

#[test]
fn a_guest_that_was_busy_is_asked_again() {
    let (bench, card) = (Bench::new(), Arc::new(Bare));
    let cancel = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            bench.answer(&[]);
            bench.answer(&[&HEARS[..], &TAKES].concat());
        });
        let mut tell = |_| {};
        let asking = Asking::new(&bench.slots, 1, Instant::now() + LONG, &cancel, &mut tell);
        put_in(asking, card.clone()).unwrap();
    });
}

#[test]
fn a_guest_that_handles_an_interrupt_is_asked_when_it_has() {
    let (bench, card) = (Bench::new(), Arc::new(Bare));
    let masks = || bench.drive(SERR_INT, &[1, 0, 0, 0]);
    masks();
    let (result, _) = bench.with_guest(&[], LONG, |asking| put_in(asking, card.clone()));
    assert!(matches!(result, Err((Error::Slot(SlotError::Deaf(1)), Left::Nothing))), "{result:?}");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            bench.drive(SERR_INT, &[0; 4]);
            bench.answer(&[&HEARS[..], &TAKES].concat());
        });
        bench.plug(&card, &[], LONG).0.unwrap();
    });
    drop(card);
    masks();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            bench.drive(SERR_INT, &[0; 4]);
            bench.answer(&[&HEARS[..], &LETS_GO].concat());
        });
        bench.with_guest(&[], LONG, ask_back).0.unwrap();
    });
}

#[test]
fn a_guest_that_ignores_the_button_gets_no_device() {
    let bench = Bench::new();
    let weak = {
        let card = Arc::new(Bare);
        let weak = Arc::downgrade(&card);
        let (result, stages) =
            bench.with_guest(&[], SHORT, |asking| put_in(asking, card as Arc<dyn PciFunction>));
        assert!(matches!(result, Err((Error::Ignored(1), Left::Nothing))), "{result:?}");
        assert_eq!(stages, [SlotStage::Asked]);
        weak
    };
    assert_eq!(weak.strong_count(), 0);
    assert!(!bench.has_card());
}

#[test]
fn a_guest_that_does_not_come_to_an_end_keeps_its_device_in_use_only() {
    let (bench, card) = (Bench::new(), Arc::new(Bare));
    let dawdles = [HEARS[0], HEARS[1], TAKES[0], TAKES[1]];
    let limit = Duration::from_millis(500);
    let (result, _) = bench.plug(&card, &[&dawdles], limit);
    // It is on the bus: to pull it would hurt the guest.
    assert!(matches!(result, Err((Error::Unfinished(1), Left::Card))), "{result:?}");
    assert!(bench.has_card());
}

#[test]
fn a_guest_that_keeps_its_device_keeps_it() {
    let (bench, card) = (Bench::new(), Arc::new(Bare));
    bench.plug(&card, &[&HEARS, &TAKES], LONG).0.unwrap();
    let (result, _) = bench.with_guest(&[&HEARS, &KEEPS], LONG, ask_back);
    assert!(matches!(result, Err((Error::Cancelled(1), Left::Card))), "{result:?}");
    let (result, _) = bench.with_guest(&[], SHORT, ask_back);
    assert!(matches!(result, Err((Error::Ignored(1), Left::Card))), "{result:?}");
    assert!(bench.has_card() && Arc::strong_count(&card) == 2);
    bench.drive(SLOT, &[0, 0, 0xff, 0]);
    bench.plug(&card, &[], SHORT).0.unwrap_err();
    assert!(bench.has_card(), "a taken slot is left alone");
}

#[test]
fn who_is_told_that_the_guest_ends_waits_no_longer() {
    let bench = Bench::new();
    bench.cancel.store(true, Ordering::Relaxed);
    let (result, _) = bench.with_guest(&[], LONG, |asking| put_in(asking, Arc::new(Bare)));
    assert!(matches!(result, Err((Error::Abandoned(1), Left::Nothing))), "{result:?}");
    assert!(!bench.has_card());
}
