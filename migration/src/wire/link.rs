//! Bytes over a connection, in and out, without a wait that has no bound.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemoryError, VolatileSlice};

use super::conduit::Conduit;
use super::frame::HEADER;
use super::{PeerError, Stream, passing};
use crate::patience::{Cancel, TICK};

/// How much is read ahead, and gathered before it is written.
const BUFFER: usize = 64 << 10;
/// Memory up to this size is gathered rather than moved on its own.
pub(super) const SMALL: usize = 16 << 10;
/// How much is believed before it arrives.
const STEP: usize = 1 << 20;

/// A connection, read ahead and written gathered.
pub(super) struct Link<S> {
    stream: S,
    pub(super) peer: String,
    /// What is going on, for errors.
    pub(super) during: &'static str,
    pub(super) deadline: Option<Instant>,
    pub(super) cancel: Cancel,
    pub(super) silence: Duration,
    /// What was read ahead: `input[taken..filled]`.
    input: Box<[u8]>,
    taken: usize,
    filled: usize,
    output: Vec<u8>,
    /// Between the socket and files of memory, once it was needed; none if there is none to be had.
    conduit: Option<Option<Conduit>>,
    /// Whether large pieces of memory come: reading ahead would only take from them.
    bulk: bool,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) busy: Duration,
}

impl<S: Stream> Link<S> {
    pub(super) fn new(stream: S, silence: Duration, cancel: Cancel) -> Result<Self, PeerError> {
        let (peer, during) = (stream.peer(), "while greeting");
        stream.set_timeout(TICK).map_err(|source| PeerError::Io {
            peer: peer.clone(),
            during,
            source,
        })?;
        Ok(Self {
            stream,
            peer,
            during,
            deadline: None,
            cancel,
            silence,
            input: vec![0; BUFFER].into(),
            taken: 0,
            filled: 0,
            output: Vec::with_capacity(BUFFER + SMALL),
            conduit: None,
            bulk: false,
            sent: 0,
            received: 0,
            busy: Duration::ZERO,
        })
    }

    /// What was read and not taken yet.
    pub(super) fn ahead(&self) -> &[u8] {
        &self.input[self.taken..self.filled]
    }

    /// Takes up to `most` bytes of what was read.
    pub(super) fn take(&mut self, most: usize) -> &[u8] {
        let from = self.taken;
        self.taken += most.min(self.ahead().len());
        &self.input[from..self.taken]
    }

    /// Reads ahead what there is, at least a byte. Whoever calls this took most of what was.
    pub(super) fn fill(&mut self, until: Instant) -> Result<(), PeerError> {
        self.fill_with(BUFFER, until)
    }

    /// Waits for a byte ahead.
    pub(super) fn peek(&mut self, until: Instant) -> Result<(), PeerError> {
        if !self.ahead().is_empty() {
            return Ok(());
        }
        self.fill_with(if self.bulk { HEADER } else { BUFFER }, until)
    }

    /// Reads ahead at most `most` bytes.
    fn fill_with(&mut self, most: usize, until: Instant) -> Result<(), PeerError> {
        self.input.copy_within(self.taken..self.filled, 0);
        self.filled -= std::mem::take(&mut self.taken);
        let end = self.input.len().min(self.filled + most);
        let read =
            self.patiently(until, |link| link.stream.read(&mut link.input[link.filled..end]))?;
        self.filled += read;
        self.received += read as u64;
        Ok(())
    }

    /// From here on memory comes in pieces of this size.
    pub(super) fn expect_memory(&mut self, size: usize) {
        self.bulk = size >= SMALL;
    }

    /// Fills `bytes`: all before `until`, or else each before the silence gets too long.
    pub(super) fn read_exact(
        &mut self,
        mut bytes: &mut [u8],
        until: Option<Instant>,
    ) -> Result<(), PeerError> {
        while !bytes.is_empty() {
            if self.ahead().is_empty() {
                let until = until.unwrap_or_else(|| self.soon());
                if bytes.len() >= SMALL {
                    let read = self.patiently(until, |link| link.stream.read(bytes))?;
                    self.received += read as u64;
                    bytes = &mut bytes[read..];
                    continue;
                }
                self.fill_with(if self.bulk { bytes.len() } else { BUFFER }, until)?;
            }
            let here = self.take(bytes.len());
            let (filled, rest) = bytes.split_at_mut(here.len());
            filled.copy_from_slice(here);
            bytes = rest;
        }
        Ok(())
    }

    /// Reads `len` bytes; allocates as they arrive.
    pub(super) fn read_vec(
        &mut self,
        len: usize,
        until: Option<Instant>,
    ) -> Result<Vec<u8>, PeerError> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let start = bytes.len();
            bytes.resize(len.min(start + STEP), 0);
            self.read_exact(&mut bytes[start..], until)?;
        }
        Ok(bytes)
    }

    /// Fills `slice`, which maps `backing` if that is a file; what is large goes straight from the
    /// socket to the guest.
    pub(super) fn read_memory<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
        backing: Option<(&File, u64)>,
    ) -> Result<(), PeerError> {
        let mut done = 0;
        self.expect_memory(slice.len());
        while done < slice.len() {
            let mut rest = slice.offset(done).map_err(|error| self.broken(error))?;
            if self.ahead().is_empty() && rest.len() >= SMALL {
                let place = backing.map(|(file, offset)| (file, offset + done as u64));
                let read = self.patiently(self.soon(), |link| link.move_in(&mut rest, place))?;
                self.received += read as u64;
                done += read;
                continue;
            }
            if self.ahead().is_empty() {
                self.fill(self.soon())?;
            }
            let place = backing.map(|(file, offset)| (file, offset + done as u64));
            let here = self.take(rest.len());
            put(here, &rest, place);
            done += here.len();
        }
        Ok(())
    }

    /// One read from the socket into `memory`, or into the file that it maps.
    fn move_in<B: BitmapSlice>(
        &mut self,
        memory: &mut VolatileSlice<'_, B>,
        place: Option<(&File, u64)>,
    ) -> io::Result<usize> {
        if let (Some(place), Some(socket)) = (place, self.stream.socket()) {
            let conduit = self.conduit.get_or_insert_with(|| {
                let made = Conduit::new();
                made.inspect_err(|error| tracing::debug!(%error, "no pipe: memory is read")).ok()
            });
            if let Some(conduit) = conduit {
                return conduit.carry(socket, place, memory);
            }
        }
        self.stream.read_volatile(memory).map_err(io_error)
    }

    /// Whether files can be passed over it.
    pub(super) fn is_local(&self) -> bool {
        self.stream.local().is_some()
    }

    /// Passes `files`, ahead of which nothing is gathered.
    pub(super) fn pass_files(&mut self, files: &[File]) -> Result<(), PeerError> {
        let until = self.soon();
        let sent = self.patiently(until, |link| match link.stream.local() {
            Some(socket) => passing::pass(socket, files),
            None => Err(ErrorKind::Unsupported.into()),
        })?;
        self.sent += sent as u64;
        Ok(())
    }

    /// Takes the files that the next byte brings. Nothing is read ahead: the peer was told just now
    /// that it may pass them.
    pub(super) fn take_files(&mut self, until: Instant) -> Result<Vec<File>, PeerError> {
        let mut files = Vec::new();
        if !self.ahead().is_empty() {
            return Ok(files);
        }
        let came = self.patiently(until, |link| match link.stream.local() {
            Some(socket) => passing::take(socket, &mut files),
            None => Err(ErrorKind::Unsupported.into()),
        })?;
        self.received += came as u64;
        Ok(files)
    }

    /// Gathers `bytes`, to be written with what follows.
    pub(super) fn gather(&mut self, bytes: &[u8]) {
        self.output.extend(bytes);
    }

    /// Gathers what `slice` holds now, and gives that.
    pub(super) fn gather_memory<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) -> &[u8] {
        let start = self.output.len();
        self.output.resize(start + slice.len(), 0);
        slice.copy_to(&mut self.output[start..]);
        &self.output[start..]
    }

    /// Forgets what was gathered.
    pub(super) fn forget(&mut self) {
        self.output.clear();
    }

    /// Writes what was gathered if it is much; else heeds a wish to stop.
    pub(super) fn flush_much(&mut self) -> Result<(), PeerError> {
        if self.output.len() < BUFFER { self.look_up() } else { self.flush() }
    }

    /// Writes what was gathered.
    pub(super) fn flush(&mut self) -> Result<(), PeerError> {
        let output = std::mem::take(&mut self.output);
        let written = self.write_all(&output);
        self.output = output;
        self.output.clear();
        written
    }

    /// Writes what was gathered, in one packet with the start of what follows if that can be.
    pub(super) fn flush_before_more(&mut self) -> Result<(), PeerError> {
        let output = std::mem::take(&mut self.output);
        let written = self.patiently(self.soon(), |link| match link.stream.socket() {
            Some(socket) => Ok(send(socket, &output, SendFlags::MORE | SendFlags::NOSIGNAL)?),
            None => link.stream.write(&output),
        });
        let written = written.and_then(|written| {
            self.sent += written as u64;
            self.write_all(&output[written..])
        });
        self.output = output;
        self.output.clear();
        written
    }

    /// Writes `bytes`, ahead of which nothing is gathered.
    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), PeerError> {
        while !bytes.is_empty() {
            let written = self.patiently(self.soon(), |link| link.stream.write(bytes))?;
            self.sent += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Writes `slice` straight from the guest, ahead of which nothing is gathered.
    pub(super) fn write_memory<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
    ) -> Result<(), PeerError> {
        let mut done = 0;
        while done < slice.len() {
            let rest = slice.offset(done).map_err(|error| self.broken(error))?;
            let written = self.patiently(self.soon(), |link| {
                link.stream.write_volatile(&rest).map_err(io_error)
            })?;
            self.sent += written as u64;
            done += written;
        }
        Ok(())
    }

    /// When the next byte is due.
    fn soon(&self) -> Instant {
        Instant::now() + self.silence
    }

    /// Heeds a wish to stop.
    pub(super) fn look_up(&self) -> Result<(), PeerError> {
        if self.cancel.is_cancelled() { Err(PeerError::Cancelled) } else { Ok(()) }
    }

    /// Repeats a read or write that timed out, until it moved at least a byte.
    fn patiently(
        &mut self,
        until: Instant,
        mut attempt: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> Result<usize, PeerError> {
        let start = Instant::now();
        let until = self.deadline.map_or(until, |deadline| deadline.min(until));
        let mut now = start;
        loop {
            self.look_up()?;
            // Also before the first attempt: a peer that sends now and then a byte is never silent.
            if now >= until {
                return Err(self.stalled(now - start));
            }
            let outcome = attempt(self);
            now = Instant::now();
            match outcome {
                Ok(0) => return Err(self.closed()),
                Ok(moved) => {
                    self.busy += now - start;
                    return Ok(moved);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::BrokenPipe
                    | ErrorKind::UnexpectedEof => return Err(self.closed()),
                    _ => return Err(self.io(error)),
                },
            }
        }
    }

    fn closed(&self) -> PeerError {
        PeerError::Closed { peer: self.peer.clone(), during: self.during }
    }

    fn stalled(&self, after: Duration) -> PeerError {
        PeerError::Stalled { peer: self.peer.clone(), during: self.during, after }
    }

    fn io(&self, source: io::Error) -> PeerError {
        PeerError::Io { peer: self.peer.clone(), during: self.during, source }
    }

    fn broken(&self, error: VolatileMemoryError) -> PeerError {
        self.io(io_error(error))
    }
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

/// Puts `content` into `slice`; by way of the file that it maps, if that can be: then its pages are
/// made of what comes, and not zeroed and mapped before.
pub(super) fn put<B: BitmapSlice>(
    content: &[u8],
    slice: &VolatileSlice<'_, B>,
    backing: Option<(&File, u64)>,
) {
    match backing.map(|(file, offset)| file.write_all_at(content, offset)) {
        Some(Ok(())) => slice.bitmap().mark_dirty(0, content.len()),
        Some(Err(_)) | None => slice.copy_from(content),
    }
}
