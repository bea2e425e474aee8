//! The far end of the guest's first serial line: a terminal, a file, a socket or nothing.
//!
//! Output is pushed by the serial device into [`Output`]; input is pulled by the event loop
//! through [`Input`], which also restores the terminal when it is dropped.

mod escape;
mod input;
mod outlet;
mod raw_mode;
#[cfg(test)]
mod tests;
mod watch;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migration::patience::Cancel;
use migration::wire::connect_unix;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::config::SerialMode;
use escape::Escape;
pub use escape::HELP;
pub use input::Input;
use input::Port;
pub use outlet::Output;
use outlet::Target;
use raw_mode::RawMode;

/// The far end of a serial line that has no guest on it yet.
#[derive(Debug)]
pub struct Console {
    port: Port,
    output: Output,
    room: Arc<EventFd>,
}

/// For the serial device: says that its buffer has room again.
#[derive(Debug, Clone)]
pub struct Room(Arc<EventFd>);

impl Room {
    /// Lets input go on. Cheap enough for every time the guest empties its buffer.
    pub fn notify(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::error!("cannot wake the serial line up: {error}");
        }
    }
}

/// Why the serial line cannot be connected.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The file cannot be opened for appending.
    #[error("cannot write the serial line's file {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot make the serial line's socket {path}", path = path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process listens there.
    #[error("the serial line's socket {path} is in use: choose another", path = path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The terminal does not do as told.
    #[error("cannot connect the serial line to standard input and output")]
    Stdio(#[source] io::Error),
}

impl Console {
    /// Connects the far end.
    ///
    /// With [`SerialMode::Stdio`], a terminal is in raw mode from here on, unless this process
    /// is in the background: then the guest gets no input.
    ///
    /// # Errors
    /// The file, socket or terminal cannot be used.
    pub fn open(mode: &SerialMode) -> Result<Self, ConsoleError> {
        let stdio = |e| ConsoleError::Stdio(e);
        let (port, target) = match mode {
            SerialMode::Null => (Port::Deaf, Target::Null),
            SerialMode::Stdio => stdio_ends().map_err(stdio)?,
            SerialMode::File(path) => {
                let mut options = OpenOptions::new();
                let opened = options.append(true).create(true).mode(0o600).open(path);
                let failed = |source| ConsoleError::File { path: path.clone(), source };
                (Port::Deaf, Target::File(opened.map_err(failed)?))
            }
            SerialMode::Socket(path) => {
                let listener = listen(path)?;
                let port = Port::Socket { listener, path: path.clone(), client: None };
                (port, Target::Client(None))
            }
        };
        Self::new(port, target).map_err(stdio)
    }

    fn new(port: Port, target: Target) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Console { port, output: Output::new(target)?, room })
    }

    /// Where the serial device writes.
    #[must_use]
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// What the serial device rings when it has taken all it was given.
    #[must_use]
    pub fn room(&self) -> Room {
        Room(self.room.clone())
    }

    /// Connects the guest: `sink` gets what is typed and says how many bytes it took, `quit` is
    /// called when the user asks for the end of the VM. Both run on the event loop's thread.
    #[must_use]
    pub fn attach(
        self,
        sink: impl FnMut(&[u8]) -> usize + Send + 'static,
        quit: impl FnMut() + Send + 'static,
    ) -> Input {
        Input::new(self.port, self.output, self.room, Box::new(sink), Box::new(quit))
    }
}

fn stdio_ends() -> io::Result<(Port, Target)> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let output = Target::Stream(stdout.as_fd().try_clone_to_owned()?);
    let source: OwnedFd = stdin.as_fd().try_clone_to_owned()?;
    let terminal = if raw_mode::is_usable(&source) {
        Some((RawMode::enter()?, Escape::default()))
    } else if rustix::termios::isatty(&source) {
        return Ok((Port::Deaf, output));
    } else {
        None
    };
    Ok((Port::Stream { source, terminal }, output))
}

/// Connects to someone who listens at `path`, who need not be waited for.
fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_unix(path, Duration::ZERO, &Cancel::new())
}

/// Listens at `path`, in the place of a socket that nobody listens on any more.
fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let failed = |source| ConsoleError::Socket { path: path.to_owned(), source };
    let bound = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match connect(path) {
            Ok(_) => return Err(ConsoleError::SocketInUse { path: path.to_owned() }),
            // Of all the files that may be there, only a dead socket refuses like this.
            Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                let is_socket = std::fs::symlink_metadata(path)
                    .is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()));
                if !is_socket {
                    return Err(failed(error));
                }
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path)
            }
            Err(_) => Err(error),
        },
        bound => bound,
    };
    let listener = bound.map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
