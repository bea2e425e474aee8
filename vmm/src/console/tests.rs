//! The console between a fake guest and the outside.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};

use super::*;

/// An event loop with one console on it, and a guest whose buffer holds `room` bytes.
struct Line {
    events: EventManager<Input>,
    output: Output,
    guest: Arc<Mutex<Guest>>,
    room: Room,
}

#[derive(Default)]
struct Guest {
    received: Vec<u8>,
    room: usize,
}

impl Line {
    fn new(console: Console, room: usize) -> Self {
        let guest = Arc::new(Mutex::new(Guest { received: Vec::new(), room }));
        let (output, bell, own) = (console.output(), console.room(), guest.clone());
        let sink = move |bytes: &[u8]| {
            let mut guest = own.lock().unwrap();
            let count = bytes.len().min(guest.room);
            guest.room -= count;
            guest.received.extend_from_slice(&bytes[..count]);
            count
        };
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(console.attach(sink, || panic!("nobody asked to quit")));
        Line { events, output, guest, room: bell }
    }

    /// Runs the loop until the condition holds; says after a while that it never will.
    fn until(&mut self, holds: impl Fn(&Guest) -> bool) {
        let began = Instant::now();
        while !holds(&self.guest.lock().unwrap()) {
            assert!(began.elapsed() < Duration::from_secs(5), "it never came");
            self.events.run_with_timeout(10).unwrap();
        }
    }

    /// Runs the loop until nothing happens any more, and says how often something did.
    fn settle(&mut self) -> usize {
        (0..1000).take_while(|_| self.events.run_with_timeout(20).unwrap() > 0).count()
    }
}

fn stream(input: impl Into<OwnedFd>, output: impl Into<OwnedFd>) -> Console {
    let port = Port::Stream { source: input.into(), terminal: None };
    Console::new(port, Target::Stream(output.into())).unwrap()
}

fn dev_null() -> File {
    File::options().read(true).write(true).open("/dev/null").unwrap()
}

#[test]
fn what_is_piped_in_reaches_the_guest_and_its_end_ends_nothing() {
    let (input, mut typed) = io::pipe().unwrap();
    let mut line = Line::new(stream(input, dev_null()), usize::MAX);
    typed.write_all(b"hello \x01x").unwrap();
    line.until(|guest| guest.received == b"hello \x01x");
    drop(typed);
    assert!(line.settle() < 10, "the end of input is seen once");
}

#[test]
fn a_regular_file_can_be_the_input() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("input");
    fs::write(&path, "abc".repeat(1000)).unwrap();
    let mut line = Line::new(stream(File::open(path).unwrap(), dev_null()), usize::MAX);
    line.until(|guest| guest.received.len() == 3000);
    assert!(line.settle() < 10, "the loop does not spin on it");
}

#[test]
fn a_guest_that_does_not_read_is_not_given_more_until_it_says_so() {
    let (input, mut typed) = io::pipe().unwrap();
    let mut line = Line::new(stream(input, dev_null()), 3);
    typed.write_all(b"0123456789").unwrap();
    line.until(|guest| guest.received == b"012");
    typed.write_all(b"abc").unwrap();
    assert_eq!(line.settle(), 0, "the loop does not spin on what nobody takes");
    line.guest.lock().unwrap().room = 4;
    line.room.notify();
    line.until(|guest| guest.received == b"0123456");
    line.guest.lock().unwrap().room = usize::MAX;
    line.room.notify();
    line.until(|guest| guest.received == b"0123456789abc");
}

#[test]
fn output_that_did_not_fit_is_written_when_there_is_room() {
    let (mut reader, writer) = io::pipe().unwrap();
    let (input, _typed) = io::pipe().unwrap();
    let mut line = Line::new(stream(input, writer), 0);
    // More than a pipe holds, less than a pipe and the backlog together.
    line.output.write_all(&[b'x'; 100_000]).unwrap();
    let mut received = 0;
    while received < 100_000 {
        let waiting = rustix::io::ioctl_fionread(&reader).unwrap();
        assert!(waiting > 0, "{received} bytes came and the rest never will");
        let mut chunk = [0; 4096];
        received += reader.read(&mut chunk).unwrap();
        line.settle();
    }
    assert_eq!(line.settle(), 0);
}

#[test]
fn a_reader_of_standard_output_that_leaves_does_not_disturb_the_loop() {
    let (reader, writer) = io::pipe().unwrap();
    let (input, _typed) = io::pipe().unwrap();
    let mut line = Line::new(stream(input, writer), 0);
    line.output.write_all(&[b'x'; 100_000]).unwrap();
    drop(reader);
    assert!(line.settle() < 10);
    line.output.write_all(b"more").unwrap();
    assert_eq!(line.settle(), 0);
}

fn socket() -> (tempfile::TempDir, PathBuf, Line) {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("serial");
    let console = Console::open(&SerialMode::Socket(path.clone())).unwrap();
    (temporary, path, Line::new(console, usize::MAX))
}

fn read(client: &mut UnixStream) -> String {
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut chunk = [0; 4096];
    let count = client.read(&mut chunk).unwrap();
    String::from_utf8_lossy(&chunk[..count]).into_owned()
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let (_temporary, path, mut line) = socket();
    line.output.write_all(b"early").unwrap();
    let mut first = UnixStream::connect(&path).unwrap();
    line.settle();
    assert_eq!(read(&mut first), "early");
    first.write_all(b"in").unwrap();
    line.until(|guest| guest.received == b"in");

    let mut second = UnixStream::connect(&path).unwrap();
    line.settle();
    assert!(read(&mut second).starts_with("another client"));
    assert_eq!(read(&mut second), "", "and it is closed");

    drop(first);
    line.settle();
    line.output.write_all(b"between").unwrap();
    let mut third = UnixStream::connect(&path).unwrap();
    line.settle();
    assert_eq!(read(&mut third), "between");
    third.write_all(b"put").unwrap();
    line.until(|guest| guest.received == b"input");
    line.output.write_all(b"now").unwrap();
    assert_eq!(read(&mut third), "now");
}

#[test]
fn a_client_that_leaves_while_output_waits_does_not_disturb_the_loop() {
    let (_temporary, path, mut line) = socket();
    for _ in 0..3 {
        let client = UnixStream::connect(&path).unwrap();
        line.settle();
        line.output.write_all(&[b'x'; 500_000]).unwrap();
        line.settle();
        drop(client);
        line.output.write_all(b"more").unwrap();
        assert!(line.settle() < 10);
    }
}

#[test]
fn a_socket_path_is_reused_when_dead_and_refused_when_alive() {
    let (_temporary, path, line) = socket();
    let again = Console::open(&SerialMode::Socket(path.clone())).unwrap_err();
    assert!(matches!(again, ConsoleError::SocketInUse { .. }), "{again}");
    drop(line);
    assert!(!path.exists(), "nothing stays behind");
    drop(UnixListener::bind(&path).unwrap());
    Console::open(&SerialMode::Socket(path.clone())).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    Console::open(&SerialMode::Socket(path.clone())).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_file_is_appended_to() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("log");
    for text in ["one\n", "two\n"] {
        let console = Console::open(&SerialMode::File(path.clone())).unwrap();
        console.output().write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    Console::open(&SerialMode::File(path.join("below"))).unwrap_err();
}
