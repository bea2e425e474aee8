//! Starts a command in the lab host with its streams connected to pipes or a terminal.
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::frame::Start;

/// This side of a command's streams. None of them blocks.
#[derive(Debug)]
pub(crate) struct Streams {
    /// What the command reads.
    pub(crate) input: Option<File>,
    /// What the command writes on stdout, or on its terminal.
    pub(crate) output: Option<File>,
    /// What the command writes on stderr, if it has no terminal.
    pub(crate) errors: Option<File>,
    terminal: Option<OwnedFd>,
}

impl Streams {
    /// Tells the command's terminal, if it has one, its new size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = &self.terminal {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            // A size that cannot be set leaves the old one: nothing worth ending the command for.
            let _ = tcsetwinsize(terminal, size);
        }
    }
}

/// Starts the command.
///
/// # Errors
/// With a line that names the command and says why it cannot be started.
pub(crate) fn spawn(start: &Start) -> io::Result<(Child, Streams)> {
    let mut words = start.command.iter().map(OsString::from);
    let program = words.next().ok_or_else(|| io::Error::other("no command was given"))?;
    let mut command =
        if start.terminal.is_some() { Command::new("setsid") } else { Command::new(&program) };
    if start.terminal.is_some() {
        command.args(["--ctty", "--wait"]).arg(&program);
    } else {
        command.process_group(0);
    }
    command.args(words).current_dir(OsString::from(&start.directory)).env_clear();
    command.envs(
        start.environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))),
    );
    let started = match start.terminal {
        Some((rows, columns)) => on_terminal(&mut command, rows, columns),
        None => on_pipes(&mut command),
    };
    started.map_err(|why| {
        io::Error::new(why.kind(), format!("cannot run {}: {why}", program.display()))
    })
}

fn on_pipes(command: &mut Command) -> io::Result<(Child, Streams)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let input = child.stdin.take().map(OwnedFd::from).map(unblocked).transpose()?;
    let output = child.stdout.take().map(OwnedFd::from).map(unblocked).transpose()?;
    let errors = child.stderr.take().map(OwnedFd::from).map(unblocked).transpose()?;
    Ok((child, Streams { input, output, errors, terminal: None }))
}

fn on_terminal(command: &mut Command, rows: u16, columns: u16) -> io::Result<(Child, Streams)> {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let name = ptsname(&terminal, Vec::new())?;
    let side =
        open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    command.stdin(side.try_clone()?).stdout(side.try_clone()?).stderr(side);
    let child = command.spawn()?;
    // The command holds copies of its side; ours would keep the terminal from ever ending.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let streams = Streams {
        input: Some(unblocked(terminal.try_clone()?)?),
        output: Some(unblocked(terminal.try_clone()?)?),
        errors: None,
        terminal: Some(terminal),
    };
    streams.resize(rows, columns);
    Ok((child, streams))
}

fn unblocked(fd: impl AsFd + Into<OwnedFd>) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(File::from(fd.into()))
}
