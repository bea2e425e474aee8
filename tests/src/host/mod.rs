//! The lab host: an emulated machine with KVM, an IOMMU and SR-IOV NICs, on any machine.
pub mod agent;
mod apic;
mod booting;
mod frame;
mod heartbeat;
mod kept;
mod machine;
mod passthrough;
mod spawn;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

pub use machine::Nesting;

use self::booting::Booting;
pub(crate) use self::frame::Bytes;
use self::frame::{Frame, Start};
use self::kept::Kept;
use crate::artefacts::Artefacts;
use crate::error::{Context, Error, Result, writing};
use crate::{cache, program};

/// Lab hosts of this process so far: each has a console of its own.
static BOOTED: AtomicUsize = AtomicUsize::new(0);

/// A running lab host. It ends when this is dropped.
#[derive(Debug)]
pub struct Lab {
    machine: Child,
    stream: UnixStream,
    console: PathBuf,
    environment: Vec<(Bytes, Bytes)>,
    /// It ended by itself, or stands still: its console tells why and is kept.
    died: bool,
    _scratch: tempfile::TempDir,
}

/// Where a command writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Its stdout.
    Out,
    /// Its stderr.
    Err,
}

impl Lab {
    /// Boots a lab host and waits until it can run commands.
    ///
    /// # Errors
    /// If it does not start, ends, or is not ready in time; with the last lines of its console.
    pub fn boot(artefacts: &Artefacts) -> Result<Self> {
        let kept = Kept::get(artefacts)?;
        Self::resume(artefacts, &kept).or_else(|error| {
            eprintln!("lab: {error}\nlab: once more, from nothing: the kept state may be at fault");
            kept.discard()?;
            Self::resume(artefacts, &Kept::get(artefacts)?)
        })
    }

    fn resume(artefacts: &Artefacts, kept: &Kept) -> Result<Self> {
        let scratch =
            tempfile::tempdir().context(|| "cannot create a temporary directory".into())?;
        let number = BOOTED.fetch_add(1, Ordering::Relaxed);
        let console = format!("console-{}-{number}.log", std::process::id());
        let console = cache::dir()?.join(console);
        let socket = scratch.path().join("agent");
        let machine = machine::Machine {
            artefacts,
            socket: &socket,
            console: &console,
            memory: &kept.memory,
        };
        let mut booting = Booting::new(&machine, || machine.resume(&kept.state))?;
        let mut stream = booting.connection()?;
        // A copy, because cargo may replace this program while it runs.
        let agent = scratch.path().join("lab");
        fs::copy("/proc/self/exe", &agent).context(|| writing(&agent))?;
        let since_1970 =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let modules = artefacts.kernel.root.join("lib/modules");
        let hello =
            format!("{}\n{}\n{}\n", since_1970.as_secs(), modules.display(), agent.display());
        stream.write_all(hello.as_bytes()).context(|| "cannot reach the lab host".into())?;
        let environment = booting.first(&stream, |received| match Frame::take(received) {
            Ok(None) => Ok(None),
            Ok(Some(Frame::Ready(environment))) => Ok(Some(environment)),
            Ok(Some(_)) | Err(_) => Err(String::from_utf8_lossy(received).into_owned()),
        })?;
        let environment = [artefacts.environment(), environment].concat();
        Ok(Self {
            machine: booting.up(),
            stream,
            console,
            environment,
            died: false,
            _scratch: scratch,
        })
    }

    /// Where the lab host's console is kept.
    #[must_use]
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// Runs a command as this process's own: its streams, its terminal and its signals are passed
    /// on, and the command's exit status is returned as a shell has it.
    ///
    /// # Errors
    /// If the lab host ends or the command cannot be started there.
    pub fn exec(&mut self, command: &[OsString], terminal: bool) -> Result<i32> {
        let passing = passthrough::Passing::begin(&self.stream, terminal)?;
        let start = self.start(command, &[], passing.size());
        self.converse(&start, |frame| passing.pass(frame))
    }

    /// Runs a command with no input; `each` is given what it writes as it comes.
    ///
    /// # Errors
    /// If the lab host ends or says nothing for longer than `silence`, or the command cannot be
    /// started there.
    pub fn run(
        &mut self,
        command: &[OsString],
        environment: &[(&str, &str)],
        silence: Duration,
        mut each: impl FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<i32> {
        let start = self.start(command, environment, None);
        let stream = self.stream.try_clone().context(|| "cannot share a socket".into())?;
        let bound = |limit| stream.set_read_timeout(limit).context(|| "cannot bound a wait".into());
        bound(Some(silence))?;
        let status = self.converse(&start, |frame| match frame {
            Frame::WantInput => Frame::Input(Vec::new()).send(&mut &stream),
            Frame::Stdout(bytes) => each(Stream::Out, bytes),
            Frame::Stderr(bytes) => each(Stream::Err, bytes),
            _ => Ok(()),
        })?;
        bound(None)?;
        Ok(status)
    }

    fn start(
        &self,
        command: &[OsString],
        extra: &[(&str, &str)],
        terminal: Option<(u16, u16)>,
    ) -> Start {
        let text = |text: &str| Bytes::from(OsString::from(text));
        let mut environment = inherited();
        environment.extend(self.environment.iter().cloned());
        environment.extend(extra.iter().map(|(name, value)| (text(name), text(value))));
        let directory = env::current_dir().unwrap_or_else(|_| "/".into());
        Start {
            command: command.iter().cloned().map(Bytes::from).collect(),
            environment,
            directory: directory.into_os_string().into(),
            terminal,
        }
    }

    fn converse(
        &mut self,
        start: &Start,
        mut on: impl FnMut(&Frame) -> io::Result<()>,
    ) -> Result<i32> {
        let mut stream = self.stream.try_clone().context(|| "cannot share a socket".into())?;
        if Frame::Start(start.clone()).send(&mut stream).is_err() {
            return Err(self.died());
        }
        loop {
            match Frame::receive(&mut stream) {
                Ok(Frame::Exit(status)) => return Ok(status),
                Ok(Frame::Refused(status, why)) => {
                    eprintln!("lab: {why}");
                    return Ok(status);
                }
                Ok(frame) => {
                    on(&frame).context(|| "cannot pass on the output of a command".into())?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(self.lost("stands still"));
                }
                Err(_) => return Err(self.died()),
            }
        }
    }

    fn died(&mut self) -> Error {
        self.lost("ended unexpectedly")
    }

    fn lost(&mut self, how: &str) -> Error {
        self.died = true;
        Error::Host(format!("the lab host {how}; {}", last_words(&self.console)))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        drop(self.stream.shutdown(Shutdown::Both));
        end(&mut self.machine);
        if !self.died {
            drop(fs::remove_file(&self.console));
        }
    }
}

/// Ends an emulated machine at once: nothing in it is worth keeping.
fn end(machine: &mut Child) {
    drop(machine.kill());
    drop(machine.wait());
}

fn last_words(console: &Path) -> String {
    let text = fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match text {
        Ok(text) if !text.trim().is_empty() => {
            let lines = program::last_lines(&text, 12);
            format!("its console ({}) ends with\n{lines}", console.display())
        }
        _ => format!("its console ({}) is empty", console.display()),
    }
}

/// The variables of this process that mean the same in the lab host.
fn inherited() -> Vec<(Bytes, Bytes)> {
    const LOCAL: [&str; 8] =
        ["CARGO", "RUST_RECURSION", "LD_", "XDG_", "DBUS_", "SSH_", "DISPLAY", "SUDO_"];
    let mut variables = env::vars_os()
        .filter(|(name, _)| !LOCAL.iter().any(|local| name.to_string_lossy().starts_with(local)))
        .filter(|(name, _)| name != "USER" && name != "LOGNAME" && name != "PATH")
        .map(|(name, value)| (name.into(), value.into()))
        .collect::<Vec<(Bytes, Bytes)>>();
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    variables.push((OsString::from("PATH").into(), path.into()));
    variables.push((OsString::from("USER").into(), OsString::from("root").into()));
    variables
}

/// Writes what a command says where it would have said it here.
///
/// # Errors
/// As stdout and stderr report them.
pub fn pass_on(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Out => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Stream::Err => io::stderr().write_all(bytes),
    }
}
