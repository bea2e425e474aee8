//! The way from a source to a destination, which can be held up and cut.
use std::io::{self, Read, Write};
use std::mem;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use crate::error::{Context, Error, Result};

const TICK: Duration = Duration::from_millis(20);

/// Passes on what comes to one address to another, and the answers. Dropped, all is cut.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    ended: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing is passed on to the destination.
    held: bool,
    /// Nothing will be once the destination says something.
    hold_at_answer: bool,
    /// Both ends of each connection.
    connections: Vec<Arc<[TcpStream; 2]>>,
}

impl Relay {
    /// A way to `to`.
    ///
    /// # Errors
    /// If there is no free port, or no thread.
    pub fn to(to: &str) -> Result<Self> {
        let to: SocketAddr = to.parse().map_err(|_| Error::Guest(format!("{to} is nowhere")))?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).context(|| "cannot listen".into())?;
        listener.set_nonblocking(true).context(|| "cannot listen".into())?;
        let address = listener.local_addr().context(|| "cannot listen".into())?;
        let shared = Arc::<Shared>::default();
        let thread = shared.clone();
        Builder::new()
            .name("relay".into())
            .spawn(move || thread.accept(&listener, to))
            .context(|| "cannot start a thread".into())?;
        Ok(Self { address, shared })
    }

    /// What the source is told to connect to.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Passes nothing on to the destination until it is released.
    pub fn hold(&self) {
        self.shared.lock().held = true;
    }

    /// Passes nothing on to the destination from when it says something.
    pub fn hold_at_answer(&self) {
        self.shared.lock().hold_at_answer = true;
    }

    /// Whether nothing is passed on to the destination.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.shared.lock().held
    }

    /// Passes everything on again.
    pub fn release(&self) {
        let mut state = self.shared.lock();
        (state.held, state.hold_at_answer) = (false, false);
        self.shared.changed.notify_all();
    }

    /// Cuts the connections that there are.
    pub fn cut(&self) {
        let connections = mem::take(&mut self.shared.lock().connections);
        connections.iter().for_each(|ends| hang_up(ends));
        self.release();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.cut();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, to: SocketAddr) {
        while !self.ended.load(Ordering::Relaxed) {
            match listener.accept() {
                // Whoever cannot be passed on is hung up on.
                Ok((stream, _)) => drop(self.connect(stream, to)),
                Err(_) => std::thread::sleep(TICK),
            }
        }
    }

    fn connect(self: &Arc<Self>, source: TcpStream, to: SocketAddr) -> io::Result<()> {
        source.set_nonblocking(false)?;
        let ends = Arc::new([source, TcpStream::connect(to)?]);
        ends.iter().try_for_each(|end| end.set_nodelay(true))?;
        self.lock().connections.push(ends.clone());
        for forth in [true, false] {
            let (shared, ends) = (self.clone(), ends.clone());
            Builder::new().name("relay".into()).spawn(move || {
                let [source, destination] = &*ends;
                let (from, to) = if forth { (source, destination) } else { (destination, source) };
                let _broken = shared.pass(from, to, forth);
                // One end that is gone takes the other with it.
                hang_up(&ends);
                shared.lock().connections.retain(|other| !Arc::ptr_eq(other, &ends));
            })?;
        }
        Ok(())
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, forth: bool) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let mut state = self.lock();
            if forth {
                while state.held {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            } else if state.hold_at_answer {
                (state.held, state.hold_at_answer) = (true, false);
            }
            drop(state);
            to.write_all(&buffer[..count])?;
        }
    }
}

fn hang_up(ends: &[TcpStream; 2]) {
    for end in ends {
        let _gone = end.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_passed_on_when_released_and_what_is_cut_is_not() {
        let there = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let relay = Relay::to(&there.local_addr().unwrap().to_string()).unwrap();
        let mut source = TcpStream::connect(relay.address()).unwrap();
        let (mut destination, _) = there.accept().unwrap();
        destination.set_read_timeout(Some(5 * TICK)).unwrap();
        let mut byte = [0];
        source.write_all(b"a").unwrap();
        destination.read_exact(&mut byte).unwrap();
        relay.hold_at_answer();
        destination.write_all(b"b").unwrap();
        source.read_exact(&mut byte).unwrap();
        assert!(relay.holds());
        source.write_all(b"c").unwrap();
        assert!(destination.read_exact(&mut byte).is_err(), "it is held");
        relay.release();
        destination.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"c");
        relay.cut();
        assert!(!matches!(destination.read(&mut byte), Ok(1)));
        assert!(!matches!(source.read(&mut byte), Ok(1)));
    }
}
