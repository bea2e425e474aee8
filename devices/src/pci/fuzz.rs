//! Guests that do anything at all to configuration space and to the working registers, while hands
//! put cards in and take them out.
//!
//! A guest is a script: any bytes are one. Those in `corpus/pci` are run each time, and changed at
//! random for as long as `UVMM_FUZZ_SECONDS` says, one second unless it is set. A script that fails
//! is printed; put it into the corpus. So is the seed: `UVMM_SEED` gives it.

mod random;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::state::testing::{load, saved};

use self::random::Random;
use super::testing::{BRIDGE, Board, Card, MEMORY, PREFETCHABLE, WORKING_REGISTERS};
use crate::bus::BusDevice;
use crate::pci::host::{ConfigPorts, Ecam};
use crate::shpc::{SlotError, Slots};

struct Nobody;

impl BusDevice for Nobody {
    fn read(&self, _: u64, _: &mut [u8]) {}
    fn write(&self, _: u64, _: &[u8]) {}
}

/// A machine, the hands at its slots, and the cards in them.
struct Bench {
    board: Board,
    ports: ConfigPorts,
    ecam: Ecam,
    slots: Arc<Slots>,
    cards: BTreeMap<u8, Arc<Card>>,
    /// What the host wants of the migration block: dirtying, and which slots paused.
    wants: (bool, Option<u32>),
}

impl Bench {
    fn new() -> Self {
        let board = Board::new();
        let slots = Slots::new(board.topology.clone(), board.bridge.clone(), board.behind);
        let ports = ConfigPorts::new(board.topology.clone(), Arc::new(Nobody));
        let ecam = Ecam::new(board.topology.clone());
        let mut bench =
            Self { board, ports, ecam, slots, cards: BTreeMap::new(), wants: (false, None) };
        let card = Card::new();
        bench.slots.insert_cold(1, card.clone()).unwrap();
        bench.cards.insert(1, card);
        bench
    }

    /// Runs one script. Each step is a kind, a place of two bytes, and data of a length in the kind.
    fn run(&mut self, script: &[u8]) {
        let mut script = script.iter().copied();
        while let Some(kind) = script.next() {
            let place: [u8; 2] = [0; 2].map(|_| script.next().unwrap_or(0));
            let data: Vec<u8> = script.by_ref().take(usize::from(kind >> 4 & 7) + 1).collect();
            self.step(kind & 0xf, u16::from_le_bytes(place), &data);
            self.check();
        }
    }

    fn step(&mut self, kind: u8, place: u16, data: &[u8]) {
        let at = u64::from(place);
        let number = data.first().map_or(0, |byte| byte % 6);
        match kind {
            0..=3 => self.board.topology.write_config(BRIDGE.0, BRIDGE.1, place & 0xff, data),
            4..=6 => {
                let slot = self.slots.place(number).ok();
                let address = slot.and_then(|place| self.board.topology.address(place));
                let bus = address.map_or(1, |address| address.bus);
                let device = number.max(1) << 3;
                self.board.topology.write_config(bus, device, place & 0x7f, data);
            }
            7..=9 => drop(self.board.mmio.write(WORKING_REGISTERS + at % 0x40, data)),
            10 => self.ecam.write(at << 4, data),
            11 => self.ports.write(at % 8, data),
            12 if place & 8 == 0 => self.ports.read(at % 8, &mut vec![0xff; data.len()]),
            12 => self.want(place, data),
            13 => {
                let card = Card::new();
                if self.slots.plug(number, card.clone()).is_ok() {
                    self.cards.insert(number, card);
                }
            }
            14 => drop(self.slots.ask_back(number).or_else(|_| self.slots.give_up(number))),
            _ => match self.slots.take_out(number) {
                Ok(function) => {
                    drop(function);
                    let card = self.cards.remove(&number).expect("only cards come out");
                    assert!(card.diary().placed.is_empty(), "it still answers");
                    assert!(!card.diary().master, "it still masters the bus");
                    assert_eq!(Arc::strong_count(&card), 1, "somebody still holds it");
                }
                Err(error) => assert!(!matches!(error, SlotError::Place(..)), "{error}"),
            },
        }
    }

    /// The host changes what it wants of the migration block.
    fn want(&mut self, place: u16, numbers: &[u8]) {
        match place >> 4 & 3 {
            0 | 1 => {
                self.wants.0 = place & 0x10 != 0;
                self.slots.want_dirtying(self.wants.0);
            }
            2 => match self.slots.ask_to_pause(numbers) {
                Ok(()) => self.wants.1 = Some(self.slots.mask(numbers).unwrap()),
                Err(error) => assert!(matches!(error, SlotError::NoSlot(_)), "{error}"),
            },
            _ => {
                self.wants.1 = None;
                self.slots.let_resume();
            }
        }
    }

    /// What holds whatever the guest does.
    fn check(&self) {
        let windows = [0x1000..0x1_0000, MEMORY..0xe000_0000, PREFETCHABLE..2 * PREFETCHABLE];
        let block = self.slots.block();
        let asked = block.wants_pause.then_some(block.asked);
        assert_eq!((block.wants_dirtying, asked), self.wants, "the guest changed a wish");
        assert_eq!((block.asked | block.paused | block.unable) >> 4, 0, "there are four slots");
        for (number, card) in &self.cards {
            let status = self.slots.status(*number).unwrap();
            assert!(status.view.card);
            for (bar, at) in card.diary().placed {
                let windows = if bar == 3 { &windows[..1] } else { &windows[1..] };
                assert!(windows.iter().any(|window| window.contains(&at)), "{bar} at {at:#x}");
            }
        }
    }

    /// A state can always be saved, and its like becomes it.
    fn moves(&self) {
        let twin = Self::new();
        if self.cards.keys().eq(twin.cards.keys()) {
            load(&*twin.board.bridge, &saved(&*self.board.bridge)).unwrap();
            load(&*twin.board.topology, &saved(&*self.board.topology)).unwrap();
            assert_eq!(saved(&*twin.board.bridge), saved(&*self.board.bridge));
        }
    }
}

/// Runs a script; one that fails is shown with what went wrong.
fn try_script(script: &[u8]) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut bench = Bench::new();
        bench.run(script);
        bench.moves();
    }));
    if let Err(why) = outcome {
        let hex: String = script.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("this script fails: {hex}");
        std::panic::resume_unwind(why);
    }
}

/// The scripts that are kept, in hexadecimal with anything else as comment.
fn corpus() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/pci");
    let mut scripts: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            let lines = text.lines().map(|line| line.split('#').next().unwrap_or(""));
            let digits: Vec<u8> =
                lines.flat_map(str::chars).filter_map(|c| c.to_digit(16)).map(nibble).collect();
            digits
                .chunks(2)
                .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
                .collect()
        })
        .collect();
    scripts.sort();
    scripts
}

fn nibble(digit: u32) -> u8 {
    u8::try_from(digit).unwrap()
}

/// Bytes that kinds, registers and values often are.
const TELLING: [u8; 8] = [0, 1, 2, 7, 0x1f, 0x3a, 0x40, 0xff];

impl Random {
    /// `script` with a few bytes changed, inserted or removed, or more of `other` behind it.
    fn change(&mut self, script: &[u8], other: &[u8]) -> Vec<u8> {
        let mut script = script.to_vec();
        for _ in 0..=self.below(8) {
            let at = self.below(script.len() + 1);
            let byte = self.byte(TELLING);
            match self.below(5) {
                0 => script.insert(at, byte),
                1 if at < script.len() => drop(script.remove(at)),
                2 => script.extend(&other[self.below(other.len())..]),
                3 => script.extend((0..16).map(|_| self.byte(TELLING)).collect::<Vec<_>>()),
                _ => {
                    if let Some(old) = script.get_mut(at) {
                        *old = byte;
                    }
                }
            }
        }
        script.truncate(4096);
        script
    }
}

#[test]
fn no_guest_of_the_corpus_nor_any_like_them_does_harm() {
    let mut scripts = corpus();
    assert!(scripts.len() > 1, "the corpus is missing");
    scripts.iter().for_each(|script| try_script(script));
    let seconds = std::env::var("UVMM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(1));
    let mut random = Random::new();
    while Instant::now() < end {
        let [one, other] = [0; 2].map(|_| random.below(scripts.len()));
        let script = random.change(&scripts[one], &scripts[other]);
        try_script(&script);
        // Long ways begin with small steps: some of what was tried is changed further.
        if scripts.len() < 256 {
            scripts.push(script);
        } else {
            let at = random.below(scripts.len());
            scripts[at] = script;
        }
    }
}
