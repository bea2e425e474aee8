//! The serial line of a guest, as a socket that uvmm offers.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::program;

/// A serial line; what came is kept, and read on from where the last wait ended.
#[derive(Debug)]
pub struct Serial {
    stream: UnixStream,
    received: Vec<u8>,
    /// Up to here it was looked at.
    seen: usize,
}

impl Serial {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// If there is no such socket yet.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self { stream, received: Vec::new(), seen: 0 })
    }

    /// Sends a line.
    ///
    /// # Errors
    /// If nobody takes it.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .context(|| format!("cannot send {line:?} to the guest"))
    }

    /// Waits until `text` comes; gives what came before it since the last call.
    ///
    /// # Errors
    /// If it does not come in time or the line ends; with the last lines that came.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = find(&self.received[self.seen..], text.as_bytes()) {
                let before = &self.received[self.seen..self.seen + at];
                let before = String::from_utf8_lossy(before).into_owned();
                self.seen += at + text.len();
                return Ok(before);
            }
            let open = self.receive();
            if !open || Instant::now() > deadline {
                let shown = program::last_lines(&self.everything(), 10);
                let why =
                    if open { format!("did not come in {limit:.0?}") } else { "never came".into() };
                return Err(Error::Timeout(format!(
                    "{text:?} {why} on the serial line; it ends with\n{shown}"
                )));
            }
        }
    }

    /// Takes what comes within a tenth of a second, if anything.
    ///
    /// Gives whether more may come.
    pub fn receive(&mut self) -> bool {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => false,
            Ok(count) => {
                self.received.extend_from_slice(&chunk[..count]);
                true
            }
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
            }
        }
    }

    /// All that ever came.
    #[must_use]
    pub fn everything(&self) -> String {
        String::from_utf8_lossy(&self.received).into_owned()
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
