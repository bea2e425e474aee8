//! The end of the control socket that people use.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migration::patience::Cancel;
use migration::wire::connect_unix;
use serde::de::{DeserializeOwned, IgnoredAny};
use thiserror::Error;

use super::message::{Info, LINE_MAX, Reply, Request, State};
use super::{RuntimeDir, RuntimeDirError};
use crate::config::VmName;

/// How long a VM that does well may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a conversation without a time limit lets the caller look up.
const TICK: Duration = Duration::from_millis(100);

/// A connection to one running VM, good for one request.
#[derive(Debug)]
pub struct Client {
    name: VmName,
    stream: UnixStream,
    received: Vec<u8>,
}

/// Why a VM did not do what it was asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The runtime directory cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// There is no VM at all.
    #[error("no VM is running: start one with `uvmm run`")]
    NoneRunning,
    /// There is no VM of that name.
    #[error("no VM named {name} is running: {others}")]
    NotRunning {
        /// The name.
        name: VmName,
        /// Which ones are.
        others: String,
    },
    /// `--vm` is needed.
    #[error("several VMs are running: choose one with --vm ({0})")]
    Several(String),
    /// The socket of a living VM cannot be reached.
    #[error("cannot connect to {name} at {path}", path = path.display())]
    Connect {
        /// The VM.
        name: VmName,
        /// Its socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said nothing for too long.
    #[error(
        "{name} did not answer within {seconds} s: its process may be stopped or overloaded",
        seconds = PATIENCE.as_secs()
    )]
    Silent {
        /// The VM.
        name: VmName,
    },
    /// The caller stopped waiting.
    #[error("{name} has not answered yet, and goes on: see `uvmm info --vm {name}`")]
    Abandoned {
        /// The VM.
        name: VmName,
    },
    /// It ended, or lost the request: what came of it is not known.
    #[error("{name} closed the connection without an answer: it may have ended, see its log")]
    Closed {
        /// The VM.
        name: VmName,
    },
    /// The connection broke.
    #[error("the connection to {name} broke")]
    Broken {
        /// The VM.
        name: VmName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It answered something that this version does not understand.
    #[error("{name} gave an answer that this version of uvmm does not understand")]
    Garbled {
        /// The VM.
        name: VmName,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It answered with a line that never ends.
    #[error("{name} gave an answer of more than {LINE_MAX} bytes")]
    TooLong {
        /// The VM.
        name: VmName,
    },
    /// It said no, and why.
    #[error("{name}: {why}")]
    Refused {
        /// The VM.
        name: VmName,
        /// Its own words.
        why: String,
    },
}

impl Client {
    /// Connects to the VM of that name, or to the only one.
    ///
    /// A VM that waits for a guest does not count beside one that has a guest.
    ///
    /// # Errors
    /// None or several run, or it cannot be reached.
    pub fn connect(dir: &RuntimeDir, name: Option<&VmName>) -> Result<Self, ClientError> {
        let name = match name {
            Some(name) if dir.is_living(name) => name.clone(),
            Some(name) => {
                let others = match list(&dir.living()?) {
                    names if names.is_empty() => "none is".to_owned(),
                    names => format!("running are {names}"),
                };
                return Err(ClientError::NotRunning { name: name.clone(), others });
            }
            None => only_one(dir)?,
        };
        let path = dir.socket(&name);
        match connect_unix(&path, PATIENCE, &Cancel::new()) {
            Ok(stream) => Ok(Client { name, stream, received: Vec::new() }),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => Err(ClientError::Silent { name }),
            Err(source) => Err(ClientError::Connect { name, path, source }),
        }
    }

    /// The VM at the other end.
    #[must_use]
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Asks, and waits for the answer for ten seconds.
    ///
    /// # Errors
    /// [`ClientError::Refused`] holds the VM's own reason; the others say what went wrong.
    pub fn ask<R: DeserializeOwned>(self, request: &Request) -> Result<R, ClientError> {
        let asked = Instant::now();
        let name = self.name.clone();
        match self.converse(request, |_: Option<IgnoredAny>| asked.elapsed() < PATIENCE) {
            Err(ClientError::Abandoned { .. }) => Err(ClientError::Silent { name }),
            outcome => outcome,
        }
    }

    /// Asks, and waits for as long as `heard` returns true.
    ///
    /// `heard` gets every progress the VM tells, and `None` ten times a second in between.
    ///
    /// # Errors
    /// As for [`Client::ask`], and [`ClientError::Abandoned`] when `heard` returned false.
    pub fn converse<P: DeserializeOwned, R: DeserializeOwned>(
        mut self,
        request: &Request,
        mut heard: impl FnMut(Option<P>) -> bool,
    ) -> Result<R, ClientError> {
        if let Err(error) = self.send(request) {
            // A VM that hung up before it read everything may have said why.
            return Err(
                match self.line().ok().flatten().map(|line| serde_json::from_slice(&line)) {
                    Some(Ok(Reply::<IgnoredAny, IgnoredAny>::Error(why))) => {
                        ClientError::Refused { name: self.name, why }
                    }
                    _ => self.broken(error),
                },
            );
        }
        loop {
            let progress = match self.line()? {
                None => None,
                Some(line) => match serde_json::from_slice(&line) {
                    Ok(Reply::Progress(progress)) => Some(progress),
                    Ok(Reply::Result(result)) => return Ok(result),
                    Ok(Reply::Error(why)) => {
                        return Err(ClientError::Refused { name: self.name, why });
                    }
                    Err(source) => return Err(ClientError::Garbled { name: self.name, source }),
                },
            };
            if !heard(progress) {
                return Err(ClientError::Abandoned { name: self.name });
            }
        }
    }

    fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.set_write_timeout(Some(PATIENCE))?;
        self.stream.set_read_timeout(Some(TICK))?;
        self.stream.write_all(&line)
    }

    /// The next line, or `None` after a [`TICK`] without one.
    fn line(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(end) = self.received.iter().position(|&b| b == b'\n') {
                let rest = self.received.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.received, rest)));
            }
            if self.received.len() > LINE_MAX {
                return Err(ClientError::TooLong { name: self.name.clone() });
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed { name: self.name.clone() }),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                // A signal ends the wait too: the caller may want to see its flag.
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock) => return Ok(None),
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted) => return Ok(None),
                Err(e) => return Err(self.broken(e)),
            }
        }
    }

    fn broken(&self, source: io::Error) -> ClientError {
        let name = self.name.clone();
        match source.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                ClientError::Closed { name }
            }
            io::ErrorKind::WouldBlock => ClientError::Silent { name },
            _ => ClientError::Broken { name, source },
        }
    }
}

fn list(names: &[VmName]) -> String {
    names.iter().map(VmName::as_str).collect::<Vec<_>>().join(", ")
}

fn only_one(dir: &RuntimeDir) -> Result<VmName, ClientError> {
    let mut names = dir.living()?;
    if names.len() > 1 {
        let all = list(&names);
        names.retain(|name| {
            let info = Client::connect(dir, Some(name)).and_then(|c| c.ask(&Request::Info {}));
            !matches!(info, Ok(Info { state: State::Incoming, .. }))
        });
        if names.len() != 1 {
            return Err(ClientError::Several(all));
        }
    }
    names.pop().ok_or(ClientError::NoneRunning)
}
