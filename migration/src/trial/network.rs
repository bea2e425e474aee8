//! A network between two threads that breaks where a test wants it to.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::bend::Bend;
use crate::wire::{Listener, Stream};

/// Longer than any side of a trial waits for the other.
const STUCK: Duration = Duration::from_secs(20);

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Break {
    /// Both sides learn of it.
    Shut,
    /// Neither does: bytes vanish.
    Hole,
    /// It does not, but once one bit is wrong.
    Flip,
    /// It does not, but once what is sent comes twice.
    Twice,
    /// It does not, but once what is sent comes after what was sent later.
    Swap,
    /// It does not, but once it takes long.
    Late,
}

impl Break {
    fn ends_it(self) -> bool {
        matches!(self, Self::Shut | Self::Hole)
    }
}

/// How many bytes pass before a connection breaks: from the source, and to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) out: usize,
    pub(super) back: usize,
    pub(super) how: Break,
}

impl Limits {
    pub(super) const NONE: Self = Self { out: usize::MAX, back: usize::MAX, how: Break::Shut };
}

/// The source's end of a connection.
pub(super) struct Line {
    stream: UnixStream,
    limits: Limits,
    broken: bool,
    /// How far it is, from the source and to it, where it bends and does not break.
    bends: [Bend; 2],
    local: bool,
    /// What passed, in both directions, for later.
    passed: Arc<Mutex<(usize, usize)>>,
}

impl Line {
    /// How many of `wanted` bytes pass; breaks the line if none do.
    fn allowed(&mut self, left: usize, wanted: usize) -> io::Result<usize> {
        if left == 0 && !self.broken {
            self.broken = true;
            if self.limits.how == Break::Shut {
                self.stream.shutdown(Shutdown::Both)?;
            }
        }
        match (self.broken, self.limits.how) {
            (false, _) => Ok(wanted.min(left)),
            (true, Break::Shut) => Ok(0),
            (true, _) => {
                thread::sleep(Duration::from_millis(2));
                Err(ErrorKind::WouldBlock.into())
            }
        }
    }

    fn outward(&mut self, wanted: usize) -> io::Result<usize> {
        if self.broken && self.limits.how == Break::Shut {
            return Err(ErrorKind::BrokenPipe.into());
        }
        match self.allowed(self.limits.out, wanted) {
            Err(_) => Ok(wanted), // into the hole
            Ok(0) => Err(ErrorKind::BrokenPipe.into()),
            allowed => allowed,
        }
    }

    fn went(&mut self, bytes: usize) -> usize {
        self.limits.out = self.limits.out.saturating_sub(bytes);
        self.passed.lock().unwrap().0 += bytes;
        bytes
    }

    fn came(&mut self, bytes: usize) -> usize {
        self.limits.back = self.limits.back.saturating_sub(bytes);
        self.passed.lock().unwrap().1 += bytes;
        bytes
    }
}

impl Line {
    fn write_bent(&mut self, bytes: &[u8]) -> io::Result<()> {
        let pieces = self.bends[0].pass(bytes);
        pieces.iter().try_for_each(|piece| self.write_whole(piece))
    }

    /// Writes all of what became of a write, however long the other side does not read.
    fn write_whole(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let start = Instant::now();
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(error) if start.elapsed() > STUCK => return Err(error),
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn read_bent(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Self { stream, bends: [_, bend], .. } = self;
        while bend.ready.is_empty() {
            let read = stream.read(bytes)?;
            if read == 0 {
                return Ok(0);
            }
            let passed = bend.pass(&bytes[..read]).concat();
            bend.ready.extend(passed);
        }
        let count = bend.ready.len().min(bytes.len());
        bytes.iter_mut().zip(bend.ready.drain(..count)).for_each(|(to, from)| *to = from);
        Ok(count)
    }
}

impl Read for Line {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if !self.limits.how.ends_it() {
            return self.read_bent(bytes);
        }
        let allowed = self.allowed(self.limits.back, bytes.len())?;
        let read = self.stream.read(&mut bytes[..allowed])?;
        Ok(self.came(read))
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.limits.how.ends_it() {
            self.write_bent(bytes)?;
            return Ok(bytes.len());
        }
        let allowed = self.outward(bytes.len())?;
        if self.broken {
            return Ok(allowed);
        }
        let written = self.stream.write(&bytes[..allowed])?;
        Ok(self.went(written))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Line {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        _: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        unreachable!("a source receives no memory")
    }
}

impl WriteVolatile for Line {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; memory.len()];
        memory.copy_to(&mut bytes[..]);
        self.write(&bytes).map_err(VolatileMemoryError::IOError)
    }
}

impl Stream for Line {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_timeout(limit)
    }
    fn peer(&self) -> String {
        "the fake network".into()
    }
    /// A file that is passed counts as no byte, but needs a line that is whole.
    fn local(&self) -> Option<BorrowedFd<'_>> {
        if self.limits.out == 0 && self.limits.how == Break::Shut {
            // Else the next byte would find out.
            let _closed = self.stream.shutdown(Shutdown::Both);
        }
        self.local.then(|| self.stream.as_fd())
    }
}

/// The destination's end of the network.
pub(super) struct Door(Receiver<UnixStream>);

impl Listener for Door {
    type Stream = UnixStream;

    fn accept(&self, wait: Duration) -> io::Result<Option<UnixStream>> {
        let wait = wait.min(Duration::from_millis(2));
        match self.0.recv_timeout(wait) {
            Ok(stream) => Ok(Some(stream)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(wait);
                Ok(None)
            }
        }
    }
}

/// The source's end of the network: what each next connection is like.
pub(super) struct Network {
    door: Sender<UnixStream>,
    /// How many connections a migration has.
    streams: usize,
    /// Which of all are limited, and how. The bytes of the last of these are counted.
    limited: Vec<(usize, Limits)>,
    /// Those that come after the migration's own; none cannot be made.
    later: Option<Limits>,
    /// How many were made.
    pub(super) connections: usize,
    /// Whether files can be passed over them.
    pub(super) local: bool,
    /// Bytes that passed over the one that is watched, from the source and to it.
    pub(super) passed: Arc<Mutex<(usize, usize)>>,
}

impl Network {
    /// For migrations over one connection, limited by `first`.
    pub(super) fn new(first: Limits, later: Option<Limits>) -> (Self, Door) {
        Self::over(1, (0, first), later)
    }

    /// For migrations over several connections, one of which is limited.
    pub(super) fn over(
        streams: usize,
        watched: (usize, Limits),
        later: Option<Limits>,
    ) -> (Self, Door) {
        Self::limited(streams, vec![watched], later)
    }

    /// For migrations over one connection, and one on which the source asks; it may ask again.
    pub(super) fn asked(first: Limits, asking: Limits) -> (Self, Door) {
        Self::limited(1, vec![(0, first), (1, asking)], Some(Limits::NONE))
    }

    fn limited(
        streams: usize,
        limited: Vec<(usize, Limits)>,
        later: Option<Limits>,
    ) -> (Self, Door) {
        let (door, arrivals) = channel();
        let passed = Arc::default();
        let network = Self { door, streams, limited, later, connections: 0, local: false, passed };
        (network, Door(arrivals))
    }

    /// A connection that nobody counts.
    pub(super) fn visit(&self) -> UnixStream {
        let (stream, other) = UnixStream::pair().unwrap();
        self.door.send(other).unwrap();
        stream
    }

    pub(super) fn connect(&mut self) -> io::Result<Line> {
        let number = self.connections;
        self.connections += 1;
        let limits = match self.limited.iter().find(|(which, _)| *which == number) {
            Some((_, limits)) => Some(*limits),
            None if number < self.streams => Some(Limits::NONE),
            None => self.later,
        };
        let limits = limits.ok_or(ErrorKind::ConnectionRefused)?;
        let watched = self.limited.last().is_some_and(|(which, _)| *which == number);
        let (stream, other) = UnixStream::pair()?;
        self.door.send(other).map_err(|_| ErrorKind::ConnectionRefused)?;
        let passed = if watched { self.passed.clone() } else { Arc::default() };
        let bends = [limits.out, limits.back].map(|at| Bend::new(at, limits.how));
        Ok(Line { stream, limits, broken: false, bends, local: self.local, passed })
    }
}
