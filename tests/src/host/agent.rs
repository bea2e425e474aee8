//! The agent: runs commands in the lab host and passes their streams, signals and status on.
//!
//! One thread waits for everything at once. What a command writes is taken from it only when the
//! lab has taken what came before, so that a slow reader slows the command down and nothing else.
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use super::frame::{Bytes, CHUNK, Frame};
use super::heartbeat;
use super::spawn::{Streams, spawn};
use crate::error::{Context, Error, Result, reading};

/// The name of the virtio port between the lab and the agent.
pub const PORT: &str = "uvmm.lab";
/// Variables that the first program of the lab host exports.
const ENVIRONMENT: [&str; 9] =
    ["PF0", "PF1", "VF0", "VF1", "VF2", "VF3", "NIC0", "NIC1", "PEER_IP"];
/// The most that is read from a command after its end: as much as a pipe can hold.
const LAST_WORDS: usize = 1 << 20;

/// Sets the lab host up and serves commands until the lab goes away.
///
/// # Errors
/// If the port is not there or the lab says what it must not say.
pub fn serve() -> Result<()> {
    heartbeat::start()?;
    let path = port()?;
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("a small flag");
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nonblocking)
        .open(&path)
        .context(|| format!("cannot open {}", path.display()))?;
    let mut line = Line { port, received: Vec::new(), unsent: Vec::new() };
    let lost = || "the lab went away".to_owned();
    line.push(&Frame::Ready(environment()));
    loop {
        // Anything else was on its way when the last command ended.
        if let Frame::Start(start) = line.wait().context(lost)? {
            match spawn(&start) {
                Ok((child, streams)) => {
                    Session::new(child, streams).run(&mut line).context(lost)?;
                }
                Err(why) => {
                    let status = if why.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
                    line.push(&Frame::Refused(status, why.to_string()));
                }
            }
        }
    }
}

/// Finds the port by its name: there is no udev here that would make a link.
fn port() -> Result<PathBuf> {
    let ports = Path::new("/sys/class/virtio-ports");
    let entries = fs::read_dir(ports).context(|| reading(ports))?;
    entries
        .flatten()
        .find(|entry| {
            fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT)
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .ok_or_else(|| Error::Host(format!("no virtio port is named {PORT}")))
}

/// What the first program of the lab host found out for commands.
fn environment() -> Vec<(Bytes, Bytes)> {
    let known = |name: &OsString| ENVIRONMENT.iter().any(|known| name == known);
    env::vars_os()
        .filter(|(name, _)| known(name))
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

/// The port and what is on its way through it.
struct Line {
    port: File,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

impl Line {
    fn push(&mut self, frame: &Frame) {
        self.unsent.extend_from_slice(&frame.encode());
    }

    fn wanted(&self) -> PollFlags {
        if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    /// Sends and receives what it can without waiting.
    fn move_bytes(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.port.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            match self.port.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for a frame.
    fn wait(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = Frame::take(&mut self.received)? {
                return Ok(frame);
            }
            let wanted = self.wanted();
            poll(&mut [PollFd::new(&self.port, wanted)], None)?;
            self.move_bytes()?;
        }
    }
}

/// A running command.
struct Session {
    child: Child,
    streams: Streams,
    /// Input that the command has not taken yet.
    input: Vec<u8>,
    input_ends: bool,
}

impl Session {
    fn new(child: Child, streams: Streams) -> Self {
        Self { child, streams, input: Vec::new(), input_ends: false }
    }

    /// Serves the command until it has ended and all that it wrote is on its way.
    fn run(mut self, line: &mut Line) -> io::Result<()> {
        let process = pidfd_open(pid(&self.child), PidfdFlags::empty())?;
        if self.streams.input.is_some() {
            line.push(&Frame::WantInput);
        }
        loop {
            let ended = self.wait(line, &process)?;
            line.move_bytes()?;
            while let Some(frame) = Frame::take(&mut line.received)? {
                self.obey(frame);
            }
            self.pass_input(line);
            if ended {
                break;
            }
            if line.unsent.is_empty() {
                self.pass_output(line, CHUNK);
            }
        }
        let status = self.child.wait()?;
        self.pass_output(line, LAST_WORDS);
        line.push(&Frame::Exit(shell_status(status)));
        Ok(())
    }

    /// Waits until something can be done; tells whether the command has ended.
    fn wait(&self, line: &Line, process: &OwnedFd) -> io::Result<bool> {
        let mut events =
            vec![PollFd::new(&line.port, line.wanted()), PollFd::new(process, PollFlags::IN)];
        if line.unsent.is_empty() {
            let outputs = [&self.streams.output, &self.streams.errors];
            events.extend(outputs.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)));
        }
        if let (false, Some(input)) = (self.input.is_empty(), &self.streams.input) {
            events.push(PollFd::new(input, PollFlags::OUT));
        }
        poll(&mut events, None)?;
        Ok(!events[1].revents().is_empty())
    }

    fn obey(&mut self, frame: Frame) {
        match frame {
            Frame::Input(bytes) if bytes.is_empty() => self.input_ends = true,
            Frame::Input(bytes) => self.input.extend_from_slice(&bytes),
            Frame::StdoutClosed => self.streams.output = None,
            Frame::Signal(number) => signal(pid(&self.child), number),
            Frame::Resize(rows, columns) => self.streams.resize(rows, columns),
            _ => {}
        }
    }

    /// Gives the command the input it has room for, and asks for more when all is given.
    fn pass_input(&mut self, line: &mut Line) {
        let Some(stream) = &mut self.streams.input else { return };
        if !self.input.is_empty() {
            match stream.write(&self.input) {
                Ok(count) => {
                    self.input.drain(..count);
                    if self.input.is_empty() {
                        line.push(&Frame::WantInput);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The command reads no more.
                Err(_) => self.streams.input = None,
            }
        }
        if self.input.is_empty() && self.input_ends {
            self.streams.input = None;
        }
    }

    /// Passes on at most about `limit` bytes of each stream.
    fn pass_output(&mut self, line: &mut Line, limit: usize) {
        pass(&mut self.streams.output, limit, |bytes| line.push(&Frame::Stdout(bytes)));
        pass(&mut self.streams.errors, limit, |bytes| line.push(&Frame::Stderr(bytes)));
    }
}

fn pass(stream: &mut Option<File>, limit: usize, mut to: impl FnMut(Vec<u8>)) {
    let mut passed = 0;
    while let (true, Some(file)) = (passed < limit, stream.as_mut()) {
        let mut chunk = vec![0; CHUNK];
        match file.read(&mut chunk) {
            Ok(count) if count > 0 => {
                chunk.truncate(count);
                passed += count;
                to(chunk);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The end; on a terminal, that no process has it open any more.
            _ => *stream = None,
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Sends a signal as a terminal or `kill` would have sent it here.
///
/// Those of the keyboard and of a hang-up go to the whole job, the others to the command alone.
fn signal(pid: Pid, number: i32) {
    let Some(signal) = Signal::from_named_raw(number) else { return };
    let sent = match signal {
        Signal::INT | Signal::QUIT | Signal::HUP => kill_process_group(pid, signal),
        _ => kill_process(pid, signal),
    };
    // A command that has just ended needs no signal.
    let _ = sent;
}

fn shell_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
