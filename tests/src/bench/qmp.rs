//! QEMU's machine protocol, as far as a migration needs it.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// How long QEMU may take for an answer, or without a word during a migration.
const ANSWER: Duration = Duration::from_secs(60);

/// A QEMU that is told what to do.
#[derive(Debug)]
pub(super) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects to the socket at `path`, which QEMU is about to make.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + ANSWER;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context(|| "QEMU does not answer".into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.set_read_timeout(Some(ANSWER)).context(|| "cannot bound a wait".into())?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.hear()?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; gives what it returns.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let sent = self.0.get_mut().write_all(line.as_bytes());
        sent.context(|| format!("cannot tell QEMU to {command}"))?;
        loop {
            let heard = self.hear()?;
            if heard["error"].is_object() {
                return Err(Error::Guest(format!("QEMU refuses to {command}: {}", heard["error"])));
            }
            if !heard["return"].is_null() {
                return Ok(heard["return"].clone());
            }
        }
    }

    /// Migrates to `uri`; returns when QEMU says that it is completed.
    pub(super) fn migrate(&mut self, uri: &str) -> Result<()> {
        self.ask("migrate", &json!({ "uri": uri }))?;
        loop {
            let heard = self.hear()?;
            match heard["data"]["status"].as_str() {
                Some("completed") if heard["event"] == "MIGRATION" => return Ok(()),
                Some("failed") if heard["event"] == "MIGRATION" => {
                    return Err(Error::Guest("QEMU's migration failed".into()));
                }
                _ => {}
            }
        }
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).context(|| "QEMU says nothing".into())?;
        if read == 0 {
            return Err(Error::Guest("QEMU ended".into()));
        }
        serde_json::from_str(&line)
            .map_err(|error| Error::Guest(format!("QEMU says {line:?}: {error}")))
    }
}
