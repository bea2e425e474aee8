//! COM1: a 16550 whose registers are vm-superio's.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{Error, NoEvents, SerialState};

use crate::bus::BusDevice;
use crate::irq::Line;

/// The first of COM1's ports.
pub const PORT: u64 = 0x3f8;
/// How many ports it has.
pub const SIZE: u64 = 8;
/// COM1's interrupt, triggered by edges.
pub const IRQ: u32 = 4;

/// How many bytes of input wait in the UART.
pub const FIFO_SIZE: usize = 64;
/// What a serial line is saved as.
pub const FORMAT: Format = Format::of::<SerialV1>();

// National Semiconductor PC16550D, table II.
const MODEM_CONTROL: u64 = 4;
const LOOP: u8 = 1 << 4;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_IDLE: u8 = 1 << 5 | 1 << 6;
const ENABLE_WRITABLE: u8 = 0x0f;
const IDENTIFICATION: u8 = 0x07;

type Uart = vm_superio::Serial<Interrupt, NoEvents, Output>;

/// Remembers that the UART wants to interrupt, until its lock is released.
#[derive(Clone, Default)]
struct Interrupt(Arc<AtomicBool>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The output, shared by the UART that runs and the one that replaces it in a load.
#[derive(Clone)]
struct Output(Arc<Mutex<Box<dyn Write + Send>>>);

impl Output {
    fn lock(&self) -> MutexGuard<'_, Box<dyn Write + Send>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

/// A serial port: [`SIZE`] bytes at [`PORT`].
pub struct Serial {
    line: Arc<dyn Line>,
    output: Output,
    room: Box<dyn Fn() + Send + Sync>,
    interrupt: Interrupt,
    /// A push could not deliver all of its input.
    short: AtomicBool,
    uart: Mutex<Uart>,
}

impl Serial {
    /// A port that interrupts by `line` and writes what the guest sends to `output`.
    ///
    /// `output` is written on the thread of a vCPU and must not wait; a byte that it refuses is
    /// lost. `room` is called after a [`push`](Self::push) fell short, once there may be room.
    #[must_use]
    pub fn new(
        line: Arc<dyn Line>,
        output: Box<dyn Write + Send>,
        room: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let output = Output(Arc::new(Mutex::new(output)));
        let interrupt = Interrupt::default();
        let uart = Mutex::new(Uart::new(interrupt.clone(), output.clone()));
        let (room, short) = (Box::new(room), AtomicBool::new(false));
        Self { line, output, room, interrupt, short, uart }
    }

    /// Hands `input` to the guest; returns how many bytes of it were taken.
    ///
    /// Keep the rest until `room` is called.
    pub fn push(&self, input: &[u8]) -> usize {
        let mut uart = self.lock();
        // The only error is a full FIFO: nothing was taken.
        let taken = uart.enqueue_raw_bytes(input).unwrap_or(0);
        if taken < input.len() {
            // With the lock held: the guest may make room as soon as it is released.
            self.short.store(true, Ordering::Relaxed);
        }
        drop(uart);
        self.deliver();
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self) {
        if self.interrupt.0.swap(false, Ordering::Relaxed) {
            self.line.pulse();
        }
    }

    fn call_if_short(&self) {
        if self.short.swap(false, Ordering::Relaxed) {
            (self.room)();
        }
    }

    fn write_register(&self, offset: u8, value: u8) {
        let result = self.lock().write(offset, value);
        if let Err(Error::IOError(why)) = result {
            tracing::debug!(%why, "a byte of serial output is lost");
        }
        self.deliver();
        if u64::from(offset) == MODEM_CONTROL && value & LOOP == 0 {
            self.call_if_short();
        }
    }

    fn read_register(&self, offset: u8) -> u8 {
        let mut uart = self.lock();
        let value = uart.read(offset);
        let empty = uart.fifo_capacity() == FIFO_SIZE;
        drop(uart);
        if empty && offset == 0 {
            self.call_if_short();
        }
        value
    }
}

/// The registers from `offset` on: a wide access to a port is one to each of its neighbours too.
fn registers(offset: u64) -> impl Iterator<Item = u8> {
    u8::try_from(offset).unwrap_or(u8::MAX)..u8::MAX
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in registers(offset).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in registers(offset).zip(data) {
            self.write_register(register, *byte);
        }
    }
}

/// All of the UART that the guest can tell.
#[derive(Serialize, Deserialize)]
struct SerialV1 {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl Saved for SerialV1 {
    const KIND: &'static str = "uart16550";
    const VERSION: u16 = 1;
}

impl From<SerialState> for SerialV1 {
    fn from(state: SerialState) -> Self {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state;
        Self {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input: in_buffer,
        }
    }
}

impl SerialV1 {
    fn check(&self) -> Result<(), &'static str> {
        let waiting = if self.input.is_empty() { 0 } else { DATA_READY };
        if self.input.len() > FIFO_SIZE {
            Err("more input waits than the FIFO holds")
        } else if self.line_status != TRANSMITTER_IDLE | waiting {
            Err("the line status does not fit the FIFO")
        } else if self.interrupt_enable & !ENABLE_WRITABLE != 0
            || self.interrupt_identification & !IDENTIFICATION != 0
        {
            Err("reserved interrupt bits are set")
        } else if self.modem_status != SerialState::default().modem_status {
            Err("the modem status is another than this UART's")
        } else {
            Ok(())
        }
    }
}

impl From<SerialV1> for SerialState {
    fn from(saved: SerialV1) -> Self {
        let SerialV1 {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            input,
        } = saved;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: input,
        }
    }
}

impl Migratable for Serial {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let state = self.lock().state();
        out.put(&SerialV1::from(state))
    }

    /// An interrupt that was pending is made again: once too often does no harm, never would.
    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let saved: SerialV1 = from.take()?;
        saved.check().map_err(StateError::invalid::<SerialV1>)?;
        let (interrupt, output) = (self.interrupt.clone(), self.output.clone());
        let uart = Uart::from_state(&saved.into(), interrupt, NoEvents, output)
            .map_err(|_| StateError::invalid::<SerialV1>("more input waits than the FIFO holds"))?;
        *self.lock() = uart;
        self.deliver();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use migration::state::testing::{assert_round_trip, load, saved};
    use proptest::prelude::*;

    use super::*;
    use crate::legacy::testing::{Wire, accesses, get, wire, withstands};

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const LINE_CONTROL: u64 = 3;
    const LINE_STATUS: u64 = 5;
    const RECEIVED: u8 = 1;

    struct Desk {
        serial: Serial,
        wire: Arc<Wire>,
        screen: Arc<Mutex<Vec<u8>>>,
        rooms: Arc<AtomicU32>,
    }

    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn desk() -> Desk {
        let (wire, screen, rooms) = (wire(), Arc::default(), Arc::new(AtomicU32::new(0)));
        let called = Arc::clone(&rooms);
        let serial = Serial::new(wire.clone(), Box::new(Screen(Arc::clone(&screen))), move || {
            called.fetch_add(1, Ordering::SeqCst);
        });
        Desk { serial, wire, screen, rooms }
    }

    #[test]
    fn what_the_guest_sends_comes_out() {
        let desk = desk();
        for byte in b"hello" {
            assert_eq!(get(&desk.serial, LINE_STATUS), TRANSMITTER_IDLE);
            desk.serial.write(DATA, &[*byte]);
        }
        assert_eq!(*desk.screen.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_interrupts_and_is_read_in_order() {
        let desk = desk();
        desk.serial.write(INTERRUPT_ENABLE, &[RECEIVED]);
        assert_eq!(desk.serial.push(b"ab"), 2);
        assert_eq!(desk.wire.edges(), 1);
        assert!(!desk.wire.level());
        assert_eq!(get(&desk.serial, INTERRUPT_IDENTIFICATION) & 0x0f, 4);
        assert_eq!(get(&desk.serial, LINE_STATUS) & DATA_READY, DATA_READY);
        assert_eq!(get(&desk.serial, DATA), b'a');
        assert_eq!(get(&desk.serial, DATA), b'b');
        assert_eq!(get(&desk.serial, LINE_STATUS) & DATA_READY, 0);
    }

    #[test]
    fn input_that_does_not_fit_is_asked_for_again() {
        let desk = desk();
        assert_eq!(desk.serial.push(&[7; FIFO_SIZE + 1]), FIFO_SIZE);
        assert_eq!(desk.serial.push(b"x"), 0);
        for _ in 1..FIFO_SIZE {
            get(&desk.serial, DATA);
        }
        assert_eq!(desk.rooms.load(Ordering::SeqCst), 0);
        get(&desk.serial, DATA);
        assert_eq!(desk.rooms.load(Ordering::SeqCst), 1);
        assert_eq!(desk.serial.push(b"x"), 1);
        get(&desk.serial, DATA);
        assert_eq!(desk.rooms.load(Ordering::SeqCst), 1, "that push was not short");
    }

    #[test]
    fn input_waits_while_the_guest_tests_the_port() {
        let desk = desk();
        desk.serial.write(MODEM_CONTROL, &[LOOP]);
        assert_eq!(desk.serial.push(b"x"), 0);
        desk.serial.write(DATA, b"t");
        assert_eq!(get(&desk.serial, DATA), b't');
        desk.serial.write(MODEM_CONTROL, &[0]);
        assert!(desk.rooms.load(Ordering::SeqCst) > 0);
        assert_eq!(desk.serial.push(b"x"), 1);
    }

    #[test]
    fn an_output_that_fails_does_not_stop_the_guest() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let wire = wire();
        let serial = Serial::new(wire.clone(), Box::new(Full), || {});
        serial.write(INTERRUPT_ENABLE, &[2]);
        get(&serial, INTERRUPT_IDENTIFICATION);
        let before = wire.edges();
        serial.write(DATA, b"x");
        assert_eq!(wire.edges(), before + 1);
    }

    #[test]
    fn unread_input_and_its_interrupt_move_with_the_guest() {
        let [from, to] = [desk(), desk()];
        from.serial.write(LINE_CONTROL, &[0x83]);
        from.serial.write(DATA, &[1]);
        from.serial.write(LINE_CONTROL, &[0x03]);
        from.serial.write(INTERRUPT_ENABLE, &[RECEIVED]);
        from.serial.push(b"typed");
        assert_round_trip(&from.serial, &to.serial);
        assert_eq!(to.wire.edges(), 1);
        assert_eq!(get(&to.serial, DATA), b't');
        to.serial.write(DATA, b"!");
        assert_eq!(*to.screen.lock().unwrap(), b"!");
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let broken: [fn(&mut SerialV1); 5] = [
            |state| {
                state.input = vec![0; FIFO_SIZE + 1];
                state.line_status |= DATA_READY;
            },
            |state| state.line_status |= DATA_READY,
            |state| state.input.push(0),
            |state| state.interrupt_enable = 0x10,
            |state| state.modem_status = 0,
        ];
        let desk = desk();
        let before = saved(&desk.serial);
        for (number, breaks) in broken.iter().enumerate() {
            let mut state = SerialV1::from(SerialState::default());
            breaks(&mut state);
            let mut out = StateWriter::new();
            out.at("test").put(&state).unwrap();
            assert!(load(&desk.serial, out.bytes()).is_err(), "state {number}");
            assert_eq!(saved(&desk.serial), before);
        }
    }

    proptest! {
        #[test]
        fn any_guest_is_withstood(accesses in accesses(SIZE), input in any::<Vec<u8>>()) {
            let desk = desk();
            desk.serial.push(&input);
            withstands(&desk.serial, &self::desk().serial, &accesses);
        }
    }
}
