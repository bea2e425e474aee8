//! QEMU's machine protocol, as far as a migration needs it.
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// How long QEMU may take for an answer, or without a word during a migration: it tells when each
/// pass begins.
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

    /// Migrates to `uri`; returns whether QEMU says within `limit` that it is completed. One that
    /// never converges tells of each pass, for ever.
    pub(super) fn migrate(&mut self, uri: &str, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        self.ask("migrate", &json!({ "uri": uri }))?;
        while Instant::now() < deadline {
            let heard = self.hear()?;
            match heard["data"]["status"].as_str() {
                Some("completed") if heard["event"] == "MIGRATION" => return Ok(true),
                Some("failed") if heard["event"] == "MIGRATION" => {
                    return Err(Error::Guest("QEMU's migration failed".into()));
                }
                _ => {}
            }
        }
        Ok(false)
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What comes of a migration by a QEMU that says `events`, over and over.
    fn migrated(events: &'static str) -> Result<bool> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::Builder::new().name("qemu".into()).spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut said = String::from("{\"QMP\": {}}\n{\"return\": {}}\n{\"return\": {}}\n");
            while stream.write_all(said.as_bytes()).is_ok() {
                said = format!("{events}\n");
                thread::sleep(Duration::from_millis(1));
            }
        });
        let mut qmp = Qmp::connect(&path)?;
        let migrated = qmp.migrate("tcp:nowhere", Duration::from_millis(300));
        drop(qmp);
        qemu.unwrap().join().unwrap();
        migrated
    }

    #[test]
    fn a_migration_that_never_ends_is_waited_for_so_long() {
        assert!(!migrated(r#"{"event": "MIGRATION_PASS", "data": {"pass": 9}}"#).unwrap());
        assert!(migrated(r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#).unwrap());
        assert!(migrated(r#"{"event": "MIGRATION", "data": {"status": "failed"}}"#).is_err());
    }
}
