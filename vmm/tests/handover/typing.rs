//! Talking to the built-in guest over its serial line.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the guest may take to look at all its memory.
const PATIENCE: Duration = Duration::from_secs(60);

/// The other end of `--serial socket=F`.
pub(crate) struct Typing {
    line: UnixStream,
    said: String,
}

impl Typing {
    pub(crate) fn to(socket: &Path) -> Self {
        let start = Instant::now();
        let line = loop {
            match UnixStream::connect(socket) {
                Ok(line) => break line,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            thread::sleep(Duration::from_millis(20));
        };
        line.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self { line, said: String::new() }
    }

    /// Types `command`, and waits until the guest says `answer`.
    pub(crate) fn ask(&mut self, command: &str, answer: &str) {
        self.said.clear();
        self.line.write_all(format!("{command}\n").as_bytes()).unwrap();
        self.hear(answer);
    }

    /// Waits until the guest says `answer`.
    pub(crate) fn hear(&mut self, answer: &str) {
        let (start, mut bytes) = (Instant::now(), [0; 4096]);
        while !self.said.contains(answer) {
            assert!(start.elapsed() < PATIENCE, "it did not say {answer:?}: {:?}", self.said);
            if let Ok(count) = self.line.read(&mut bytes) {
                self.said.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        }
    }

    /// Has the guest look at all its memory.
    pub(crate) fn is_whole(&mut self) {
        self.ask("stop", "stop ok");
        self.ask("verify", "verify ok");
    }
}
