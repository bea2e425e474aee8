//! What is typed, or sent by a client, on its way to the guest.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::Output;
use super::escape::{Escape, HELP, Key};
use super::raw_mode::RawMode;
use super::watch::Watch;

/// Bytes read at a time, and so the most that is held back for a guest that does not read.
const CHUNK: usize = 256;

type Sink = Box<dyn FnMut(&[u8]) -> usize + Send>;
type Quit = Box<dyn FnMut() + Send>;

/// The other end of the serial line, as part of the event loop: it hands input to the guest and
/// writes the output that did not fit at once.
pub struct Input {
    port: Port,
    output: Output,
    room: Arc<EventFd>,
    sink: Sink,
    quit: Quit,
    /// Was read but not taken; nothing more is read until it is.
    held: Vec<u8>,
    input_watch: Watch,
    output_watch: Watch,
}

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Port {
    /// Nowhere.
    Deaf,
    /// Standard input.
    Stream {
        source: OwnedFd,
        /// For a terminal: its mode, and the keys that mean uvmm.
        terminal: Option<(RawMode, Escape)>,
    },
    /// One client after the other.
    Socket { listener: UnixListener, path: PathBuf, client: Option<UnixStream> },
}

impl Input {
    pub(super) fn new(
        port: Port,
        output: Output,
        room: Arc<EventFd>,
        sink: Sink,
        quit: Quit,
    ) -> Self {
        let [input_watch, output_watch] = [Watch::default(), Watch::default()];
        Input { port, output, room, sink, quit, held: Vec::new(), input_watch, output_watch }
    }

    fn read(&mut self, ops: &mut EventOps<'_>) {
        let mut chunk = [0; CHUNK];
        let count = match &self.port {
            Port::Stream { source, .. } => rustix::io::read(source, &mut chunk),
            Port::Socket { client: Some(client), .. } => rustix::io::read(client, &mut chunk),
            _ => return,
        };
        match count {
            Ok(count) if count > 0 => self.take_in(&chunk[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The end of input is not the end of the guest.
            _ => self.hang_up(ops),
        }
    }

    fn take_in(&mut self, bytes: &[u8]) {
        let Port::Stream { terminal: Some((_, escape)), .. } = &mut self.port else {
            self.held.extend_from_slice(bytes);
            return self.push();
        };
        for &byte in bytes {
            match escape.key(byte) {
                Key::Byte(byte) => self.held.push(byte),
                Key::Quit => (self.quit)(),
                Key::Help => {
                    let _ = write!(io::stderr(), "\n{HELP}");
                }
                Key::Nothing => {}
            }
        }
        self.push();
    }

    fn push(&mut self) {
        if !self.held.is_empty() {
            let taken = (self.sink)(&self.held).min(self.held.len());
            self.held.drain(..taken);
        }
    }

    fn hang_up(&mut self, ops: &mut EventOps<'_>) {
        // First, while it is open: a closed one cannot be taken out of the loop.
        self.input_watch.set(ops, None, EventSet::empty());
        match &mut self.port {
            Port::Socket { client, .. } => {
                *client = None;
                self.output.outlet().set_client(None);
            }
            port => *port = Port::Deaf,
        }
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Port::Socket { listener, client, .. } = &mut self.port else { return };
        let accepted = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!("cannot accept a client of the serial line: {error}");
                }
                return;
            }
        };
        // A client whose output failed is gone, whether or not it was seen going.
        if client.is_some() && self.output.outlet().has_client() {
            let busy = b"another client has this serial line\r\n";
            let _ = rustix::io::write(&accepted, busy);
            return;
        }
        let ends = accepted.set_nonblocking(true).and_then(|()| accepted.try_clone());
        match ends {
            Ok(end) => {
                self.input_watch.set(ops, None, EventSet::empty());
                *client = Some(accepted);
                self.output.outlet().set_client(Some(end));
            }
            Err(error) => tracing::warn!("cannot serve a client of the serial line: {error}"),
        }
    }

    /// Watches exactly what there is a use for.
    fn rearm(&mut self, ops: &mut EventOps<'_>) {
        let want_input = if self.held.is_empty() { EventSet::IN } else { EventSet::empty() };
        let outlet = self.output.outlet();
        let want_output = if outlet.wants_room() { EventSet::OUT } else { EventSet::empty() };
        let stream = outlet.stream_fd();
        drop(outlet);
        let (source, set) = match &self.port {
            Port::Deaf => (None, EventSet::empty()),
            Port::Stream { source, .. } => (Some(source.as_raw_fd()), want_input),
            Port::Socket { client, .. } => {
                (client.as_ref().map(AsRawFd::as_raw_fd), want_input | want_output)
            }
        };
        self.input_watch.set(ops, source, set);
        self.output_watch.set(ops, stream, want_output);
    }

    fn add(ops: &mut EventOps<'_>, fd: RawFd) {
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            tracing::error!("the serial line does not work: {error}");
        }
    }
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        Self::add(ops, self.room.as_raw_fd());
        Self::add(ops, self.output.wake().as_raw_fd());
        if let Port::Socket { listener, .. } = &self.port {
            Self::add(ops, listener.as_raw_fd());
        }
        self.rearm(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.room.as_raw_fd() {
            let _ = self.room.read();
            self.push();
        } else if fd == self.output.wake().as_raw_fd() {
            let _ = self.output.wake().read();
        } else if matches!(&self.port, Port::Socket { listener, .. } if listener.as_raw_fd() == fd)
        {
            self.accept(ops);
        } else {
            if self.input_watch.is_for(fd) && self.held.is_empty() {
                self.read(ops);
            }
            self.output.outlet().flush();
        }
        self.rearm(ops);
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Port::Socket { path, .. } = &self.port {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input").field("held", &self.held.len()).finish_non_exhaustive()
    }
}
