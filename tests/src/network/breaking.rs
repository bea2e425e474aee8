//! A network between two hosts that breaks once, at a place that was chosen before.
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt;

use crate::error::{Context, Result};

/// How long nothing passes before it turns out that nothing ever will.
const STALL: Duration = Duration::from_secs(1);
/// A message with a token: header, which message, token, checksum.
const MESSAGE: usize = 16 + 1 + 16 + 4;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    Out,
    /// From the destination to the source.
    Back,
}

/// A message of the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The destination has everything.
    Ready,
    /// The source gives the guest away.
    Commit,
    /// The destination runs it.
    Running,
    /// The source knows.
    Done,
}

impl Word {
    /// All of them, as they follow each other.
    pub const ALL: [Self; 4] = [Self::Ready, Self::Commit, Self::Running, Self::Done];
    /// How many bytes each takes on the wire.
    pub const SIZE: u64 = MESSAGE as u64;

    fn way(self) -> Way {
        match self {
            Self::Ready | Self::Running => Way::Back,
            Self::Commit | Self::Done => Way::Out,
        }
    }

    /// How it begins on the wire.
    fn start(self) -> [u8; 17] {
        let number = match self {
            Self::Ready => 6,
            Self::Commit => 7,
            Self::Running => 8,
            Self::Done => 9,
        };
        [1, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number]
    }
}

/// Where it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At this byte of all that go this way, over all connections, counted from 0.
    Byte(Way, u64),
    /// At this byte of that message.
    Within(Word, u64),
}

/// How it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All connections end; new ones come through.
    Cut,
    /// Nothing passes for a while, and then they end.
    Stall,
    /// One bit is wrong.
    Flip,
    /// All connections end, and none comes through before [`Breaking::heal`].
    Gone,
}

/// The network. Dropped, it lets no new connections through.
#[derive(Debug)]
pub struct Breaking {
    address: String,
    network: Arc<Network>,
}

#[derive(Debug)]
struct Network {
    place: Place,
    fault: Fault,
    passed: [AtomicU64; 2],
    broke: AtomicBool,
    stalls: AtomicBool,
    open: AtomicBool,
    ended: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Breaking {
    /// A network that leads to `to`, and breaks at `place`.
    ///
    /// # Errors
    /// If there is no port or thread for it.
    pub fn to(to: &str, place: Place, fault: Fault) -> Result<Self> {
        let cannot = || "cannot put a network between two VMs".into();
        let listener = TcpListener::bind(("127.0.0.1", 0)).context(cannot)?;
        let address = listener.local_addr().context(cannot)?.to_string();
        let network = Arc::new(Network {
            place,
            fault,
            passed: Default::default(),
            broke: AtomicBool::new(false),
            stalls: AtomicBool::new(false),
            open: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let (served, to) = (network.clone(), to.to_owned());
        thread::Builder::new()
            .name("network".into())
            .spawn(move || served.serve(&listener, &to))
            .context(cannot)?;
        Ok(Self { address, network })
    }

    /// Where it leads from.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it broke.
    #[must_use]
    pub fn broke(&self) -> bool {
        self.network.broke.load(SeqCst)
    }

    /// How many bytes went this way.
    #[must_use]
    pub fn passed(&self, way: Way) -> u64 {
        self.network.passed[way as usize].load(SeqCst)
    }

    /// Lets new connections through again.
    pub fn heal(&self) {
        self.network.open.store(true, SeqCst);
    }
}

impl Drop for Breaking {
    fn drop(&mut self) {
        self.network.ended.store(true, SeqCst);
        // Whoever waits for a connection gets one.
        drop(TcpStream::connect(&self.address));
    }
}

impl Network {
    fn serve(self: &Arc<Self>, listener: &TcpListener, to: &str) {
        for near in listener.incoming().flatten() {
            if self.ended.load(SeqCst) {
                return;
            }
            if self.open.load(SeqCst)
                && let Ok(far) = TcpStream::connect(to)
            {
                drop(self.join(&near, &far));
            }
        }
    }

    /// Relays both ways between `near` and `far`, each on a thread of its own.
    fn join(self: &Arc<Self>, near: &TcpStream, far: &TcpStream) -> std::io::Result<()> {
        for (from, to, way) in [(near, far, Way::Out), (far, near, Way::Back)] {
            to.set_nodelay(true)?;
            let (from, to, network) = (from.try_clone()?, to.try_clone()?, self.clone());
            self.streams.lock().unwrap_or_else(PoisonError::into_inner).push(to.try_clone()?);
            let relay = thread::Builder::new().name("relay".into());
            relay.spawn(move || network.relay(from, &to, way))?;
        }
        Ok(())
    }

    fn relay(&self, mut from: TcpStream, mut to: &TcpStream, way: Way) {
        let mut bytes = vec![0; 1 << 18];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let bytes = &mut bytes[..count];
            while self.stalls.load(SeqCst) {
                thread::sleep(STALL / 100);
            }
            let passed = match self.breaks_at(way, bytes) {
                None => to.write_all(bytes),
                Some(at) => self.break_at(at, bytes, to),
            };
            if passed.is_err() {
                // As a network tells a sender that nobody takes what it sends.
                let _closed = from.shutdown(Shutdown::Both);
            }
        }
        // Whoever hung up is no longer there to be told.
        let _closed = to.shutdown(Shutdown::Write);
    }

    /// Where in `bytes` it breaks now, if it does.
    fn breaks_at(&self, way: Way, bytes: &[u8]) -> Option<usize> {
        let before = self.passed[way as usize].fetch_add(bytes.len() as u64, SeqCst);
        let at = match self.place {
            Place::Byte(its, byte) if its == way => usize::try_from(byte.checked_sub(before)?).ok(),
            // Whoever sends such a message waits for its answer: nothing follows it.
            Place::Within(word, byte) if word.way() == way => {
                let start = bytes.len().checked_sub(MESSAGE)?;
                let is_it = bytes[start..].starts_with(&word.start());
                usize::try_from(byte).ok().filter(|_| is_it).map(|byte| start + byte)
            }
            Place::Byte(..) | Place::Within(..) => None,
        };
        at.filter(|&at| at < bytes.len() && !self.broke.swap(true, SeqCst))
    }

    fn break_at(&self, at: usize, bytes: &mut [u8], mut to: &TcpStream) -> std::io::Result<()> {
        if self.fault == Fault::Flip {
            bytes[at] ^= 1 << (at % 8);
            return to.write_all(bytes);
        }
        to.write_all(&bytes[..at])?;
        match self.fault {
            Fault::Stall => {
                self.stalls.store(true, SeqCst);
                thread::sleep(STALL);
            }
            Fault::Gone => self.open.store(false, SeqCst),
            Fault::Cut | Fault::Flip => {}
        }
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // So that who sends learns of it, even where the stall has closed the window.
            sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
            let _closed = stream.shutdown(Shutdown::Both);
        }
        self.stalls.store(false, SeqCst);
        Err(std::io::ErrorKind::ConnectionAborted.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(place: Place, fault: Fault) -> (TcpListener, Breaking) {
        let there = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = there.local_addr().unwrap().to_string();
        (there, Breaking::to(&address, place, fault).unwrap())
    }

    /// What `sent` becomes on its way out.
    fn through(sent: &[u8], (there, network): &(TcpListener, Breaking)) -> Vec<u8> {
        let mut here = TcpStream::connect(network.address()).unwrap();
        let (mut arrived, mut came) = (there.accept().unwrap().0, Vec::new());
        here.write_all(sent).unwrap();
        let _closed = here.shutdown(Shutdown::Write);
        let _cut = arrived.read_to_end(&mut came);
        assert!(network.broke());
        came
    }

    #[test]
    fn it_breaks_at_the_byte_that_was_chosen() {
        let sent = |fault| through(b"something", &network(Place::Byte(Way::Out, 5), fault));
        assert_eq!(sent(Fault::Cut), b"somet");
        assert_eq!(sent(Fault::Stall), b"somet");
        assert_eq!(sent(Fault::Flip), [&b"somet"[..], &[b'h' ^ 1 << 5], b"ing"].concat());
    }

    #[test]
    fn it_breaks_within_the_message_that_was_chosen() {
        let message = [&b"state"[..], &Word::Commit.start(), &[9; 20]].concat();
        let cut = network(Place::Within(Word::Commit, 20), Fault::Cut);
        assert_eq!(through(&message, &cut), message[..25]);
    }

    #[test]
    fn a_network_that_is_gone_lets_nobody_through_before_it_heals() {
        let both = network(Place::Byte(Way::Out, 0), Fault::Gone);
        assert!(through(b"x", &both).is_empty());
        let (there, network) = both;
        let connect = || TcpStream::connect(network.address()).unwrap();
        assert_eq!(connect().read(&mut [0]).unwrap_or(0), 0, "nobody is there");
        network.heal();
        let mut here = connect();
        here.write_all(b"y").unwrap();
        there.accept().unwrap().0.read_exact(&mut [0]).unwrap();
    }
}
