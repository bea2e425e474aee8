//! Peers that say anything at all.

use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::time::Duration;

use migration::handover::Token;
use migration::patience::{Cancel, Patience};
use migration::progress::Watch;
use migration::record::NoRecord;
use migration::report::Status;
use migration::wire::{Channel, Codec, Frame, Hello, Listener, Message, Stream, Totals};
use migration::{Options, receive, send};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::machines::{Empty, Guest, SIZE, offer};

/// A connection at whose other end everything is said already.
struct Script {
    said: io::Cursor<Vec<u8>>,
    /// What was answered.
    heard: Vec<u8>,
}

impl Script {
    fn new(said: &[u8]) -> Self {
        Self { said: io::Cursor::new(said.to_vec()), heard: Vec::new() }
    }
}

impl Read for Script {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.said.read(bytes)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend(bytes);
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
        let read = self.said.read(&mut bytes).map_err(VolatileMemoryError::IOError)?;
        memory.copy_from(&bytes[..read]);
        Ok(read)
    }
}

impl WriteVolatile for Script {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        Ok(memory.len())
    }
}

impl Stream for Script {
    fn set_timeout(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
    fn peer(&self) -> String {
        "a script".into()
    }
}

/// One connection arrives; then nobody wants anything any more.
struct Once {
    script: Mutex<Option<Script>>,
    over: Cancel,
    /// How long to wait before that.
    lull: Duration,
}

impl Listener for Once {
    type Stream = Script;

    fn accept(&self, _: Duration) -> io::Result<Option<Script>> {
        let script = self.script.lock().expect("nobody panics with it").take();
        if script.is_none() {
            std::thread::sleep(self.lull);
            self.over.cancel();
        }
        Ok(script)
    }
}

fn patience() -> Patience {
    let [short, none] = [Duration::from_millis(50), Duration::ZERO];
    Patience {
        greeting: short,
        prepare: short,
        silence: short,
        stopped: short,
        running: none,
        settling: none,
        asking: none,
        answering: none,
    }
}

/// A destination to which anything is said runs nothing, and tells why.
pub(crate) fn destination(data: &[u8]) {
    let why = refused(data, Duration::ZERO);
    assert!(!why.contains('\n'), "{why}");
}

/// Why nothing came of a source that said `data`, and of nobody for `lull` after it.
pub(crate) fn refused(data: &[u8], lull: Duration) -> String {
    let over = Cancel::new();
    let script = Mutex::new(Some(Script::new(data)));
    let listener = Once { script, over: over.clone(), lull };
    let watch = Watch { progress: &mut |_| {}, cancel: over, record: Box::new(NoRecord) };
    let failure = receive(&mut Empty, listener, &patience(), watch).err().expect("nothing arrives");
    failure.to_string()
}

/// A source to which anything is said gives the guest away only to who was ready for it.
pub(crate) fn source(data: &[u8]) {
    give_to(data);
}

/// Whether a source gave its guest to a destination that said `data`.
pub(crate) fn give_to(data: &[u8]) -> bool {
    let mut guest = Guest::new();
    let mut scripts = Some(Script::new(data)).into_iter();
    let connect = || scripts.next().ok_or_else(|| io::ErrorKind::ConnectionRefused.into());
    let options = Options { patience: patience(), ..Options::default() };
    let watch = Watch { progress: &mut |_| {}, cancel: Cancel::new(), record: Box::new(NoRecord) };
    match send(&mut guest, connect, &options, watch) {
        Ok(report) => report.status == Status::Completed,
        Err(failure) => {
            assert!(!failure.to_string().contains('\n'), "{failure}");
            false
        }
    }
}

/// `messages` as they go over the wire, after a greeting.
fn said(messages: &[Message]) -> Vec<u8> {
    let mut script = Script::new(&[]);
    script.heard.extend(Hello::OURS.encode());
    let heard = std::sync::Arc::new(Mutex::new(script.heard));
    let mut peer =
        Channel::new(Tape(heard.clone()), Duration::from_secs(1), Cancel::new()).expect("a tape");
    for message in messages {
        peer.send(message).expect("a tape takes it");
    }
    drop(peer);
    heard.lock().expect("nobody panics with it").clone()
}

/// Keeps what is written.
struct Tape(std::sync::Arc<Mutex<Vec<u8>>>);

impl Read for Tape {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Tape {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        _: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        Ok(0)
    }
}

impl WriteVolatile for Tape {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        Ok(memory.len())
    }
}

impl Stream for Tape {
    fn set_timeout(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }
    fn peer(&self) -> String {
        "a tape".into()
    }
}

fn token() -> Token {
    "00112233445566778899aabbccddeeff".parse().expect("a token")
}

/// What sources say, up to where they would have to know the token.
pub(super) fn from_a_source() -> Vec<Vec<u8>> {
    let offer = |dry_run| Message::Offer { offer: offer(), dry_run, streams: 1 };
    let run = migration::ram::Run { start: GuestAddress(0), len: SIZE as u64 };
    let mut whole = said(&[offer(false)]);
    let headers = [header(Frame::Zero { run }), header(Frame::State { len: 0 })].concat();
    whole.extend(&headers);
    let checksum = crc32fast::hash(&headers);
    let end = Message::End(Totals { zero_pages: 4, checksum, ..Totals::default() });
    whole.extend(&said(&[end, Message::Commit(token())])[16..]);
    let mut memory = said(&[offer(false)]);
    let page = migration::ram::Run { len: 4096, ..run };
    memory.extend(header(Frame::Ram { run: page, checked: true, packed: None }));
    memory.extend([7; 4096]);
    memory.extend(crc32fast::hash(&[7; 4096]).to_le_bytes());
    memory.extend(&said(&[Message::RoundEnd])[16..]);
    let mut packed = said(&[offer(false)]);
    packed.extend(header(Frame::Ram { run: page, checked: true, packed: Some(Codec::Lz4) }));
    packed.extend(26_u32.to_le_bytes());
    packed.extend(sevens());
    packed.extend(crc32fast::hash(&[7; 4096]).to_le_bytes());
    packed.extend(&said(&[Message::RoundEnd])[16..]);
    vec![said(&[offer(true)]), said(&[Message::Query(token())]), whole, memory, packed]
}

/// A page of sevens as a block of LZ4: one, 4090 times the byte before, and five more.
fn sevens() -> [u8; 26] {
    let mut block = [0xff; 26];
    block[..4].copy_from_slice(&[0x1f, 7, 1, 0]);
    block[19..].copy_from_slice(&[246, 0x50, 7, 7, 7, 7, 7]);
    block
}

/// As the module of frames documents it.
fn header(frame: Frame) -> [u8; 16] {
    let (kind, flags, len, gpa) = match frame {
        Frame::Message { len } => (1u16, 0u16, len as u64, 0),
        Frame::Ram { run, checked, packed } => {
            let packed = packed.map_or(0, |codec| if codec == Codec::Lz4 { 2 } else { 4 });
            (2, packed | u16::from(checked), run.len, run.start.0)
        }
        Frame::Zero { run } => (3, 0, run.len / 4096, run.start.0),
        Frame::State { len } => (4, 0, len as u64, 0),
    };
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[4..8].copy_from_slice(&u32::try_from(len).expect("small").to_le_bytes());
    bytes[8..].copy_from_slice(&gpa.to_le_bytes());
    bytes
}

/// What destinations say, to the end.
pub(super) fn from_a_destination() -> Vec<Vec<u8>> {
    let ready = [Message::Accepted(token()), Message::RoundTaken, Message::Ready(token())];
    let with = |last| [&ready[..], &[last]].concat();
    vec![
        said(&[Message::Mismatched(Vec::new())]),
        said(&[Message::GaveUp("no".into())]),
        said(&with(Message::Running(token()))),
        said(&with(Message::Answer(migration::handover::Verdict::Refused))),
    ]
}
