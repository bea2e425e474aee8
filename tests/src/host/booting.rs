//! A lab host on its way up: every wait has an end, and says when it is long.
use std::fs;
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use super::machine::Machine;
use super::{end, last_words};
use crate::error::{Context, Error, Result};

/// How long the lab host may take. An emulated one that starts from nothing takes 15 seconds, on a
/// busy machine several times that.
const TIMEOUT: Duration = Duration::from_secs(240);
/// When to begin to tell the user that it takes long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Dropped before it is up, the lab host ends.
pub(super) struct Booting {
    machine: Option<Child>,
    listener: UnixListener,
    console: PathBuf,
    since: Instant,
    told: Instant,
}

impl Booting {
    /// Starts a machine with `start`.
    pub(super) fn new(
        machine: &Machine<'_>,
        start: impl FnOnce() -> Result<Child>,
    ) -> Result<Self> {
        let listener = UnixListener::bind(machine.socket)
            .context(|| format!("cannot listen on {}", machine.socket.display()))?;
        listener.set_nonblocking(true).context(|| "cannot configure a socket".into())?;
        // What an earlier machine said must not be taken for this one's words.
        drop(fs::remove_file(machine.console));
        let (now, console) = (Instant::now(), machine.console.to_path_buf());
        Ok(Self { machine: Some(start()?), listener, console, since: now, told: now })
    }

    /// Waits until the machine has connected the agent's port.
    pub(super) fn connection(&mut self) -> Result<UnixStream> {
        loop {
            if let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(false).context(|| "cannot configure a socket".into())?;
                return Ok(stream);
            }
            self.still_on_the_way()?;
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the first thing that the lab host says, as `parse` finds it in what was received.
    ///
    /// An error of `parse` is what the lab host said instead.
    pub(super) fn first<T>(
        &mut self,
        mut stream: &UnixStream,
        parse: impl Fn(&mut Vec<u8>) -> std::result::Result<Option<T>, String>,
    ) -> Result<T> {
        let mut received = Vec::new();
        let timeout =
            |limit| stream.set_read_timeout(limit).context(|| "cannot configure a socket".into());
        timeout(Some(Duration::from_secs(1)))?;
        loop {
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk) {
                Ok(count) => received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context(|| "cannot hear the lab host".into()),
            }
            match parse(&mut received) {
                Ok(Some(value)) => {
                    timeout(None)?;
                    return Ok(value);
                }
                Ok(None) => self.still_on_the_way()?,
                Err(said) => {
                    let words = last_words(&self.console);
                    return Err(Error::Host(format!(
                        "the lab host says: {}; {words}",
                        said.trim()
                    )));
                }
            }
        }
    }

    /// The machine, which is up.
    pub(super) fn up(mut self) -> Child {
        self.machine.take().expect("it is taken here only")
    }

    fn still_on_the_way(&mut self) -> Result<()> {
        let machine = self.machine.as_mut().expect("it is taken at the end only");
        let waited = self.since.elapsed();
        if let Ok(Some(status)) = machine.try_wait() {
            let words = last_words(&self.console);
            return Err(Error::Host(format!("the lab host did not start ({status}); {words}")));
        }
        // A kept state that QEMU cannot take leaves an idle QEMU behind.
        let console = fs::read(&self.console).unwrap_or_default();
        if String::from_utf8_lossy(&console).lines().any(is_complaint) {
            let words = last_words(&self.console);
            return Err(Error::Host(format!("the lab host did not start; {words}")));
        }
        if waited > TIMEOUT {
            let words = last_words(&self.console);
            return Err(Error::Timeout(format!(
                "the lab host was not ready after {waited:.0?}; {words}"
            )));
        }
        if self.told.elapsed() > PATIENCE {
            self.told = Instant::now();
            eprintln!(
                "lab: still waiting for the lab host ({waited:.0?}); its console is {}",
                self.console.display()
            );
        }
        Ok(())
    }
}

/// Whether QEMU wrote this line, and did not mean it as a warning; or the kernel, of a processor
/// whose timer's interrupt QEMU lost. It does not come up any more then.
fn is_complaint(line: &str) -> bool {
    let of_qemu = line.strip_prefix("qemu-system-x86_64: ");
    of_qemu.is_some_and(|line| !line.starts_with("warning: ")) || line.contains("detected stalls")
}

impl Drop for Booting {
    fn drop(&mut self) {
        if let Some(machine) = &mut self.machine {
            end(machine);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_host_that_does_not_come_up_says_so() {
        for line in [
            "qemu-system-x86_64: load of migration failed: Invalid argument",
            "[   26.530899] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        ] {
            assert!(is_complaint(line), "{line}");
        }
        for line in [
            "qemu-system-x86_64: warning: hub 0 is not connected to host network",
            "[    2.213488] x2apic: IRQ remapping doesn't support X2APIC mode",
        ] {
            assert!(!is_complaint(line), "{line}");
        }
    }
}
