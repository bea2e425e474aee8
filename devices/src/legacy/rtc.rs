//! The MC146818 real-time clock and its battery-backed RAM, at ports 0x70 and 0x71.
//!
//! It shows the host's time plus an offset that the guest sets by setting the clock. Alarm and
//! update interrupts work; the machine calls [`Rtc::poll`] when they are due. Periodic interrupts
//! do not: kernels have had better timers for decades.
//!
//! Names are those of the MC146818A data sheet; register 0x32, the century, is what FADT's
//! `CENTURY` should name.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use migration::state::{Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::time_format::{Fields, Format};
use crate::bus::BusDevice;
use crate::irq::Line;

/// The index port; the data port follows.
pub const PORT: u64 = 0x70;
/// How many ports there are.
pub const SIZE: u64 = 2;
/// The interrupt of the clock.
pub const IRQ: u32 = 8;
/// The register of the century.
pub const CENTURY: u8 = 0x32;
/// What the clock is saved as.
pub const FORMAT: migration::state::Format = migration::state::Format::of::<RtcV1>();

const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
const BYTES: usize = 128;
const NMI_DISABLE: u8 = 0x80;

const UIP: u8 = 1 << 7; // A: update in progress
const SET: u8 = 1 << 7; // B: the clock stands still and may be set
const AF: u8 = 1 << 5; // C: alarm; the same bit of B enables its interrupt
const UF: u8 = 1 << 4; // C: update ended; the same bit of B enables its interrupt
const IRQF: u8 = 1 << 7; // C: one of the above interrupts
const VRT: u8 = 1 << 7; // D: the battery is good
const ANY: u8 = 0xc0; // these two bits of an alarm byte match any time

const A_AT_START: u8 = 0x26; // 32.768 kHz, 1024 Hz
const B_AT_START: u8 = super::time_format::HOURS_24;

/// For so long before the next second a read could see half of the update. The data sheet says
/// 244 us, but for a guest each read of a register takes much longer than for a PC.
const UPDATE_MICROS: i64 = 2_000;
const SECOND_MICROS: i64 = 1_000_000;
const DAY: i64 = 86_400;
/// No guest can set a date that is farther from the host's than ten thousand years.
const FARTHEST: i64 = 10_000 * 366 * DAY;

#[derive(Clone)]
struct Registers {
    index: u8,
    a: u8,
    b: u8,
    /// AF and UF of register C.
    flags: u8,
    /// Seconds, minutes, hours.
    alarm: [u8; 3],
    ram: [u8; BYTES],
    /// Seconds that the guest's clock is ahead of the host's.
    offset: i64,
    /// The fields of the standing clock, while SET is.
    set: Option<Fields>,
    /// The guest's second up to which updates and alarms have been noticed.
    seen: i64,
}

/// The clock: [`SIZE`] bytes at [`PORT`].
pub struct Rtc {
    line: Arc<dyn Line>,
    now: Box<dyn Fn() -> i64 + Send + Sync>,
    changed: Box<dyn Fn() + Send + Sync>,
    registers: Mutex<Registers>,
}

impl Rtc {
    /// A clock that shows the host's time in UTC and interrupts by `line`, level-triggered.
    ///
    /// `changed` is called on the thread of a vCPU when [`poll`](Self::poll) may have another
    /// answer.
    #[must_use]
    pub fn new(line: Arc<dyn Line>, changed: impl Fn() + Send + Sync + 'static) -> Self {
        Self::with_clock(line, changed, host_micros)
    }

    /// `now` gives microseconds since 1970.
    fn with_clock(
        line: Arc<dyn Line>,
        changed: impl Fn() + Send + Sync + 'static,
        now: impl Fn() -> i64 + Send + Sync + 'static,
    ) -> Self {
        let registers = Registers {
            index: 0,
            a: A_AT_START,
            b: B_AT_START,
            flags: 0,
            alarm: [0; 3],
            ram: [0; BYTES],
            offset: 0,
            set: None,
            seen: now().div_euclid(SECOND_MICROS),
        };
        let (now, changed) = (Box::new(now), Box::new(changed));
        Self { line, now, changed, registers: Mutex::new(registers) }
    }

    /// Makes the interrupts that are due; returns how long until it must be called again.
    ///
    /// None as long as nothing is due until `changed` is called.
    pub fn poll(&self) -> Option<Duration> {
        self.with(|registers, now| registers.next_interrupt(now))
    }

    /// Lets `work` at registers that have noticed all up to now, and makes the line follow.
    fn with<T>(&self, work: impl FnOnce(&mut Registers, i64) -> T) -> T {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.now)();
        registers.notice(now);
        let result = work(&mut registers, now);
        // With the lock held, so that two levels cannot overtake each other.
        self.line.set(registers.interrupts());
        result
    }
}

/// The host's time; the range of dates that a clock shows is far within that of the number.
fn host_micros() -> i64 {
    let elapsed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX / 2)
}

impl Registers {
    fn format(&self) -> Format {
        Format(self.b)
    }

    fn seconds(&self, now: i64) -> i64 {
        now.div_euclid(SECOND_MICROS) + self.offset
    }

    fn interrupts(&self) -> bool {
        self.flags & self.b & (AF | UF) != 0
    }

    /// Raises the flags for the seconds that have passed.
    fn notice(&mut self, now: i64) {
        let second = self.seconds(now);
        if self.set.is_none() && second > self.seen {
            self.flags |= UF;
            if self.next_alarm().is_some_and(|alarm| alarm <= second) {
                self.flags |= AF;
            }
        }
        // Also backwards, where the host's clock went.
        self.seen = second;
    }

    fn next_interrupt(&self, now: i64) -> Option<Duration> {
        if self.interrupts() || self.set.is_some() {
            return None;
        }
        let second = if self.b & UF != 0 {
            self.seen + 1
        } else if self.b & AF != 0 {
            self.next_alarm()?
        } else {
            return None;
        };
        let micros = (second - self.offset) * SECOND_MICROS - now;
        Some(Duration::from_micros(u64::try_from(micros).unwrap_or(0)))
    }

    /// The first second after `seen` that the alarm matches, within a day.
    fn next_alarm(&self) -> Option<i64> {
        let format = self.format();
        let matches = |byte: u8, field: u8| byte & ANY == ANY || byte == field;
        let second = |value| matches(self.alarm[0], format.number(value));
        let minute = |value| matches(self.alarm[1], format.number(value));
        let hour = |value| matches(self.alarm[2], format.hour(value));
        // Without this a guest could make the search below try every second of the day.
        if !(0..60).any(second) || !(0..60).any(minute) || !(0..24).any(hour) {
            return None;
        }
        let field = |value: i64| u8::try_from(value).expect("below 60");
        let mut at = self.seen + 1;
        while at <= self.seen + DAY {
            let of_day = at.rem_euclid(DAY);
            if !hour(field(of_day / 3600)) {
                at += 3600 - of_day % 3600;
            } else if !minute(field(of_day / 60 % 60)) {
                at += 60 - of_day % 60;
            } else if second(field(of_day % 60)) {
                return Some(at);
            } else {
                at += 1;
            }
        }
        None
    }

    /// Shows `seconds` from now on.
    fn set_time(&mut self, seconds: i64, now: i64) {
        self.offset = seconds - now.div_euclid(SECOND_MICROS);
        self.seen = seconds;
    }

    fn read(&mut self, now: i64) -> u8 {
        match self.index {
            1 | 3 | 5 => self.alarm[usize::from(self.index / 2)],
            A => {
                let in_second = now.rem_euclid(SECOND_MICROS);
                let updating = self.set.is_none() && in_second >= SECOND_MICROS - UPDATE_MICROS;
                self.a | if updating { UIP } else { 0 }
            }
            B => self.b,
            C => {
                let interrupting = if self.interrupts() { IRQF } else { 0 };
                std::mem::take(&mut self.flags) | interrupting
            }
            D => VRT,
            index => match field(index) {
                Some(field) => self.fields(now)[field],
                None => self.ram[usize::from(index)],
            },
        }
    }

    fn fields(&self, now: i64) -> Fields {
        self.set.unwrap_or_else(|| self.format().encode(self.seconds(now)))
    }

    fn write(&mut self, value: u8, now: i64) {
        match self.index {
            1 | 3 | 5 => self.alarm[usize::from(self.index / 2)] = value,
            A => self.a = value & !UIP,
            B => self.write_b(value, now),
            C | D => {}
            index => match field(index) {
                Some(field) => self.write_field(field, value, now),
                None => self.ram[usize::from(index)] = value,
            },
        }
    }

    /// A field that makes no time of all of them is not taken, unless others can follow.
    fn write_field(&mut self, field: usize, value: u8, now: i64) {
        let mut fields = self.fields(now);
        fields[field] = value;
        if let Some(set) = &mut self.set {
            *set = fields;
        } else if let Some(seconds) = self.format().decode(fields) {
            self.set_time(seconds, now);
        }
    }

    fn write_b(&mut self, value: u8, now: i64) {
        if value & SET != 0 {
            self.set = Some(self.fields(now));
            // SET also clears UIE.
            self.b = value & !UF;
            return;
        }
        self.b = value;
        if let Some(fields) = self.set.take()
            && let Some(seconds) = self.format().decode(fields)
        {
            self.set_time(seconds, now);
        }
    }
}

/// Which field of the time register `index` shows.
fn field(index: u8) -> Option<usize> {
    [0, 2, 4, 6, 7, 8, 9, CENTURY].iter().position(|&register| register == index)
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The index can only be written; its port reads as ones.
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            if port != 1 {
                continue;
            }
            let (value, index) = self.with(|registers, now| (registers.read(now), registers.index));
            *byte = value;
            if index == C {
                (self.changed)();
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..=u64::MAX).zip(data) {
            match port {
                0 => self.with(|registers, _| registers.index = value & !NMI_DISABLE),
                1 => {
                    self.with(|registers, now| registers.write(*value, now));
                    (self.changed)();
                }
                _ => {}
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct RtcV1 {
    index: u8,
    a: u8,
    b: u8,
    flags: u8,
    alarm: [u8; 3],
    ram: Vec<u8>,
    offset: i64,
    set: Option<Fields>,
    seen: i64,
}

impl Saved for RtcV1 {
    const KIND: &'static str = "mc146818";
    const VERSION: u16 = 1;
}

impl RtcV1 {
    fn check(self) -> Result<Registers, &'static str> {
        let Self { index, a, b, flags, alarm, ram, offset, set, seen } = self;
        if index & NMI_DISABLE != 0 || a & UIP != 0 || flags & !(AF | UF) != 0 {
            return Err("reserved bits are set");
        }
        if set.is_some() != (b & SET != 0) {
            return Err("the clock stands still without SET, or runs with it");
        }
        if offset.unsigned_abs() > FARTHEST.unsigned_abs()
            || seen.unsigned_abs() > FARTHEST.unsigned_abs()
        {
            return Err("the time is out of range");
        }
        let ram = <[u8; BYTES]>::try_from(ram).map_err(|_| "the RAM has another size")?;
        Ok(Registers { index, a, b, flags, alarm, ram, offset, set, seen })
    }
}

impl Migratable for Rtc {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Registers { index, a, b, flags, alarm, ram, offset, set, seen } = registers;
        let ram = ram.to_vec();
        out.put(&RtcV1 { index, a, b, flags, alarm, ram, offset, set, seen })
    }

    /// What was due while the guest moved is due at the next [`Rtc::poll`].
    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let saved: RtcV1 = from.take()?;
        let loaded = saved.check().map_err(StateError::invalid::<RtcV1>)?;
        let level = loaded.interrupts();
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        *registers = loaded;
        self.line.set(level);
        drop(registers);
        (self.changed)();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
