//! Connections at whose other end everything is said already.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use migration::handover::Token;
use migration::state::decode_exact;
use migration::wire::{Hello, Listener, Message, Stream};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::machines::memory;

/// What scripts call a migration: the destination's own name for it takes its place.
pub(super) fn token() -> Token {
    "00112233445566778899aabbccddeeff".parse().expect("a token")
}

fn bytes_of(token: Token) -> Vec<u8> {
    postcard::to_stdvec(&token).expect("plain")
}

/// Where each message is in what one side says, header and checksum included.
fn messages(said: &[u8]) -> Vec<Range<usize>> {
    let (mut at, mut found) = (if said.starts_with(b"uvmm") { 16 } else { 0 }, Vec::new());
    while let Some(header) = said.get(at..).and_then(|rest| rest.first_chunk::<16>()) {
        let size = |at: usize| {
            let word = said.get(at..).and_then(|rest| rest.first_chunk()).copied();
            u32::from_le_bytes(word.unwrap_or_default()) as usize
        };
        let sum = if header[2] & 1 == 0 { 0 } else { 4 };
        let body = match header[0] {
            1 => size(at + 4) + 4,
            2 if header[2] & 6 == 0 => size(at + 4) + sum,
            2 => 4 + size(at + 16) + sum,
            3 => 0,
            4 => size(at + 4),
            _ => break,
        };
        let message = at..at + 16 + body;
        at = message.end;
        if header[0] == 1 && at <= said.len() {
            found.push(message);
        }
    }
    found
}

/// What is in each of them, as far as it can be read.
pub(super) fn decoded(said: &[u8]) -> Vec<Message> {
    let each = messages(said).into_iter();
    each.filter_map(|at| decode_exact(&said[at.start + 16..at.end - 4]).ok()).collect()
}

/// The connections that `data` stands for: each greeting begins one.
pub(super) fn connections(data: &[u8]) -> Vec<Vec<u8>> {
    let greeting = Hello::OURS.encode();
    let mut starts: Vec<_> =
        (1..data.len()).filter(|&at| data[at..].starts_with(&greeting)).collect();
    starts.insert(0, 0);
    starts.push(data.len());
    starts.windows(2).map(|ends| data[ends[0]..ends[1]].to_vec()).collect()
}

/// `data` with the checksums of all messages made right. Whoever changes bytes at random hardly
/// ever finds them.
pub(super) fn mended(data: &[u8]) -> Vec<u8> {
    let mut said = connections(data);
    for said in &mut said {
        for at in messages(said) {
            sign(&mut said[at]);
        }
    }
    said.concat()
}

fn sign(message: &mut [u8]) {
    let (body, sum) = message.split_at_mut(message.len() - 4);
    sum.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
}

/// What all connections of a trial know.
#[derive(Default)]
pub(super) struct Known {
    /// What the destination calls the migration.
    name: OnceLock<Token>,
    /// How many of them may yet say something.
    open: AtomicUsize,
    /// All that was answered, over those that are closed.
    heard: Mutex<Vec<Message>>,
}

impl Known {
    pub(super) fn heard(&self) -> Vec<Message> {
        self.heard.lock().expect("nobody panics with it").clone()
    }
}

/// One connection.
pub(super) struct Script {
    said: Vec<u8>,
    read: usize,
    /// Nothing is said behind one of these before all up to it is read: it may be an answer.
    stops: Vec<usize>,
    /// What was answered.
    heard: Vec<u8>,
    /// Over which files are passed, and its other end.
    socket: Option<[UnixStream; 2]>,
    ended: bool,
    known: Arc<Known>,
}

impl Script {
    pub(super) fn new(said: Vec<u8>, known: &Arc<Known>) -> Self {
        known.open.fetch_add(1, Ordering::SeqCst);
        let messages = decoded(&said);
        let shares = messages.contains(&Message::Share) || messages.contains(&Message::Pass);
        let stops = self::messages(&said).iter().map(|at| at.end).collect();
        let (socket, known) = (shares.then(passed), known.clone());
        Self { said, read: 0, stops, heard: Vec::new(), socket, ended: false, known }
    }

    /// One for each connection of `data`.
    pub(super) fn all(data: &[u8], known: &Arc<Known>) -> VecDeque<Self> {
        connections(data).into_iter().map(|said| Self::new(said, known)).collect()
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.known.open.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Says what comes next by the name that the migration has got.
    fn rename(&mut self) {
        let Some(&name) = self.known.name.get() else { return };
        let rest = &mut self.said[self.read..];
        for at in messages(rest) {
            let message = &mut rest[at];
            let signed = message[message.len() - 4..] == {
                let body = &message[..message.len() - 4];
                crc32fast::hash(body).to_le_bytes()
            };
            if signed && message.get(17..33) == Some(&bytes_of(token())) {
                message[17..33].copy_from_slice(&bytes_of(name));
                sign(message);
            }
        }
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.known.heard.lock().expect("nobody panics with it").extend(decoded(&self.heard));
        self.end();
    }
}

/// A socket that a file comes through, of the size of a guest's memory.
fn passed() -> [UnixStream; 2] {
    let (ours, theirs) = UnixStream::pair().expect("sockets are to be had");
    ours.set_read_timeout(Some(Duration::from_millis(50))).expect("it is no zero");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let file = memory();
    let files = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)), "there is room for one");
    sendmsg(&theirs, &[IoSlice::new(b"m")], &mut control, SendFlags::empty()).expect("it is open");
    [ours, theirs]
}

impl Read for Script {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.rename();
        let stop = self.stops.iter().find(|&&stop| stop > self.read);
        let rest = &self.said[self.read..stop.copied().unwrap_or(self.said.len())];
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        self.read += count;
        if rest.is_empty() {
            self.end();
        }
        Ok(count)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend(bytes);
        if self.known.name.get().is_none() {
            let named = |message: &Message| match message {
                Message::Accepted(name) => Some(*name),
                _ => None,
            };
            let name = decoded(&self.heard).iter().find_map(named);
            if let Some(name) = name {
                let _raced = self.known.name.set(name);
            }
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Script {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        memory: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; memory.len()];
        let read = self.read(&mut bytes).map_err(VolatileMemoryError::IOError)?;
        memory.copy_from(&bytes[..read]);
        Ok(read)
    }
}

impl WriteVolatile for Script {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; memory.len()];
        memory.copy_to(&mut bytes[..]);
        self.write(&bytes).map_err(VolatileMemoryError::IOError)
    }
}

impl Stream for Script {
    fn set_timeout(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
    fn peer(&self) -> String {
        "a script".into()
    }
    fn local(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(|[ours, _]| ours.as_fd())
    }
}

/// Where scripts arrive: the next once one that came before it got a name for the migration, or
/// ended. Then nobody will.
pub(super) struct Door {
    scripts: Mutex<VecDeque<Script>>,
    known: Arc<Known>,
}

impl Door {
    pub(super) fn new(data: &[u8], known: &Arc<Known>) -> Self {
        Self { scripts: Mutex::new(Script::all(data, known)), known: known.clone() }
    }
}

impl Listener for Door {
    type Stream = Script;

    fn accept(&self, _: Duration) -> io::Result<Option<Script>> {
        let mut scripts = self.scripts.lock().expect("nobody panics with it");
        let open = self.known.open.load(Ordering::SeqCst);
        if open == 0 {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let named = self.known.name.get().is_some();
        let next = if named || open == scripts.len() { scripts.pop_front() } else { None };
        if next.is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(next)
    }
}
