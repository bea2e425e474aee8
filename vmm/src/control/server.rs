//! The VM's end of the control socket: part of its event loop, and never in its way.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use thiserror::Error;

use super::message::{LINE_MAX, Request, RequestError};
use super::{Claim, Replier};
use crate::cause;

/// How many clients may be connected.
const CONNECTIONS_MAX: usize = 32;

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Who waits for it.
    pub reply: Replier,
}

/// Listens on the control socket and turns lines into [`Call`]s.
///
/// Clients are not trusted to read, write or go on: nothing here blocks, lines are bounded, and
/// a new client takes the place of the one that has kept silent for longest.
pub struct Server {
    listener: UnixListener,
    /// Clients that have not yet sent a whole line.
    silent: HashMap<RawFd, Silent>,
    accepted: u64,
    /// One reference here and one in each [`Replier`].
    open: Arc<()>,
    on_call: Box<dyn FnMut(Call) + Send>,
}

struct Silent {
    stream: UnixStream,
    line: Vec<u8>,
    arrival: u64,
}

/// Why there is no control socket.
#[derive(Debug, Error)]
#[error("cannot listen on the control socket {path}", path = path.display())]
pub struct ServerError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Server {
    /// Listens on the socket of `claim`; `on_call` gets every request, on the thread of the
    /// event loop.
    ///
    /// # Errors
    /// The socket cannot be made, for example because its path is longer than 107 bytes.
    pub fn new(
        claim: &Claim,
        on_call: impl FnMut(Call) + Send + 'static,
    ) -> Result<Self, ServerError> {
        let listen = || {
            let listener = UnixListener::bind(claim.socket())?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let failed = |source| ServerError { path: claim.socket().to_owned(), source };
        Ok(Server {
            listener: listen().map_err(failed)?,
            silent: HashMap::new(),
            accepted: 0,
            open: Arc::new(()),
            on_call: Box::new(on_call),
        })
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!("cannot accept a client on the control socket: {error}");
                }
                return;
            }
        };
        if self.silent.len() + Arc::strong_count(&self.open) > CONNECTIONS_MAX {
            let Some(oldest) = self.silent.iter().min_by_key(|(_, silent)| silent.arrival) else {
                let busy = "the VM is busy with other requests: try again later";
                return Replier::new(stream, self.open.clone()).finish::<()>(Err(busy.into()));
            };
            self.forget(*oldest.0, ops);
        }
        let fd = stream.as_raw_fd();
        let added = stream
            .set_nonblocking(true)
            .map_err(|e| e.to_string())
            .and_then(|()| ops.add(Events::new(&stream, EventSet::IN)).map_err(|e| e.to_string()));
        if let Err(error) = added {
            tracing::warn!("cannot serve a client on the control socket: {error}");
            return;
        }
        self.accepted += 1;
        self.silent.insert(fd, Silent { stream, line: Vec::new(), arrival: self.accepted });
    }

    fn read(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(silent) = self.silent.get_mut(&fd) else { return };
        let request = match silent.read() {
            Ok(None) => return,
            Ok(Some(line)) => Request::parse(&line),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(RequestError::TooLong),
            Err(_) => {
                self.forget(fd, ops);
                return;
            }
        };
        let Some(Silent { stream, .. }) = self.forget(fd, ops) else { return };
        let reply = Replier::new(stream, self.open.clone());
        match request {
            Ok(request) => (self.on_call)(Call { request, reply }),
            Err(error) => reply.finish::<()>(Err(cause::chain(&error))),
        }
    }

    fn forget(&mut self, fd: RawFd, ops: &mut EventOps<'_>) -> Option<Silent> {
        let silent = self.silent.remove(&fd)?;
        if let Err(error) = ops.remove(Events::empty(&silent.stream)) {
            tracing::warn!("cannot stop watching a client of the control socket: {error}");
        }
        Some(silent)
    }
}

impl Silent {
    /// Takes in what is there; `Some` when that completes a line.
    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut chunk = [0; 4096];
        loop {
            let count = match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let new = &chunk[..count];
            let end = new.iter().position(|&b| b == b'\n');
            self.line.extend_from_slice(&new[..end.unwrap_or(count)]);
            if self.line.len() >= LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.listener, EventSet::IN)) {
            tracing::error!("the control socket does not work: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.listener.as_raw_fd() {
            self.accept(ops);
        } else {
            self.read(events.fd(), ops);
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("listener", &self.listener).finish_non_exhaustive()
    }
}
