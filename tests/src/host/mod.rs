//! The lab host: an emulated machine with KVM, an IOMMU and SR-IOV NICs, on any machine.
pub mod agent;
mod frame;
mod machine;
mod passthrough;
mod spawn;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

pub use machine::Nesting;

pub(crate) use self::frame::Bytes;
use self::frame::{Frame, Start};
use crate::artefacts::Artefacts;
use crate::error::{Context, Error, Result};
use crate::{cache, program};

/// How long the lab host may take to be ready. An emulated one takes about five seconds, on a busy
/// machine several times that.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// When to begin to tell the user that it takes long.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running lab host. It ends when this is dropped.
#[derive(Debug)]
pub struct Lab {
    machine: Child,
    stream: UnixStream,
    console: PathBuf,
    environment: Vec<(Bytes, Bytes)>,
    /// It ended by itself: its console tells why and is kept.
    died: bool,
    _scratch: tempfile::TempDir,
}

/// What a command wrote and how it ended.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The exit status as a shell has it.
    pub status: i32,
    /// All of stdout.
    pub stdout: Vec<u8>,
    /// All of stderr.
    pub stderr: Vec<u8>,
}

impl Lab {
    /// Boots a lab host and waits until it can run commands.
    ///
    /// # Errors
    /// If it does not start, ends, or is not ready in time; with the last lines of its console.
    pub fn boot(artefacts: &Artefacts) -> Result<Self> {
        let cache = cache::dir()?;
        let console = cache.join(format!("console-{}.log", std::process::id()));
        let scratch =
            tempfile::tempdir().context(|| "cannot create a temporary directory".into())?;
        let socket = scratch.path().join("agent");
        let listener = UnixListener::bind(&socket)
            .context(|| format!("cannot listen on {}", socket.display()))?;
        let machine = machine::start(artefacts, &socket, &console)?;
        let mut booting =
            Booting { machine: Some(machine), console: console.clone(), since: Instant::now() };
        let stream = booting.connection(&listener)?;
        let environment = booting.ready(&stream)?;
        stream.set_read_timeout(None).context(|| "cannot configure a socket".into())?;
        let machine = booting.machine.take().expect("it is taken here only");
        let environment = [artefacts.environment(), environment].concat();
        Ok(Self { machine, stream, console, environment, died: false, _scratch: scratch })
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
    /// If the lab host ends or the command cannot be started there.
    pub fn run(
        &mut self,
        command: &[OsString],
        environment: &[(&str, &str)],
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<i32> {
        let start = self.start(command, environment, None);
        let stream = self.stream.try_clone().context(|| "cannot share a socket".into())?;
        self.converse(&start, |frame| match frame {
            Frame::WantInput => Frame::Input(Vec::new()).send(&mut &stream),
            Frame::Stdout(bytes) | Frame::Stderr(bytes) => each(bytes),
            _ => Ok(()),
        })
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
                Ok(Frame::Refused(why)) => return Err(Error::Host(why)),
                Ok(frame) => {
                    on(&frame).context(|| "cannot pass on the output of a command".into())?
                }
                Err(_) => return Err(self.died()),
            }
        }
    }

    fn died(&mut self) -> Error {
        self.died = true;
        Error::Host(format!("the lab host ended unexpectedly; {}", last_words(&self.console)))
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

/// A lab host on its way up; dropped before it is up, it ends.
struct Booting {
    machine: Option<Child>,
    console: PathBuf,
    since: Instant,
}

impl Booting {
    fn connection(&mut self, listener: &UnixListener) -> Result<UnixStream> {
        listener.set_nonblocking(true).context(|| "cannot configure a socket".into())?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).context(|| "cannot configure a socket".into())?;
                    return Ok(stream);
                }
                Err(_) => self.still_alive()?,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the first frame.
    fn ready(&mut self, mut stream: &UnixStream) -> Result<Vec<(Bytes, Bytes)>> {
        let mut received = Vec::new();
        let mut told = self.since;
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .context(|| "cannot configure a socket".into())?;
        loop {
            let mut chunk = [0; 4096];
            match io::Read::read(&mut stream, &mut chunk) {
                Ok(count) => received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context(|| "cannot hear the lab host".into()),
            }
            match Frame::take(&mut received) {
                Ok(None) => self.still_alive()?,
                Ok(Some(Frame::Ready(environment))) => return Ok(environment),
                Ok(Some(Frame::Refused(why))) => {
                    return Err(Error::Host(format!("the lab host could not be set up: {why}")));
                }
                Ok(Some(_)) | Err(_) => {
                    return Err(Error::Host("the lab host says what makes no sense".into()));
                }
            }
            if told.elapsed() > PATIENCE {
                told = Instant::now();
                let waited = self.since.elapsed().as_secs();
                eprintln!("lab: still waiting for the lab host to boot ({waited} s)");
            }
        }
    }

    fn still_alive(&mut self) -> Result<()> {
        let machine = self.machine.as_mut().expect("it is taken at the end only");
        if let Ok(Some(status)) = machine.try_wait() {
            let words = last_words(&self.console);
            return Err(Error::Host(format!("the lab host did not start ({status}); {words}")));
        }
        if self.since.elapsed() > BOOT_TIMEOUT {
            let limit = BOOT_TIMEOUT.as_secs();
            let words = last_words(&self.console);
            return Err(Error::Timeout(format!(
                "the lab host was not ready after {limit} s; {words}"
            )));
        }
        Ok(())
    }
}

impl Drop for Booting {
    fn drop(&mut self) {
        if let Some(machine) = &mut self.machine {
            end(machine);
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
        .filter(|(name, _)| name != "HOME" && name != "USER" && name != "LOGNAME" && name != "PATH")
        .map(|(name, value)| (name.into(), value.into()))
        .collect::<Vec<(Bytes, Bytes)>>();
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    variables.push((OsString::from("PATH").into(), path.into()));
    variables.push((OsString::from("HOME").into(), OsString::from("/root").into()));
    variables.push((OsString::from("USER").into(), OsString::from("root").into()));
    variables
}

/// Writes what a command says to this process's stdout as it comes.
///
/// # Errors
/// As stdout reports them.
pub fn to_stdout(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}
