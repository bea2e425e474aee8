//! Makes a command in the lab host look like one of this process: streams, signals and terminal.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use super::frame::{CHUNK, Frame};
use crate::error::{Context, Result};

/// The way out, shared by those who send.
type Out = Arc<Mutex<UnixStream>>;

/// Passes things on while it lives.
pub(super) struct Passing {
    out: Out,
    /// Wakes the thread that reads stdin: the command has room for more.
    room: Sender<()>,
    terminal: Option<Raw>,
}

impl Passing {
    /// Begins to pass signals and, when asked for, input.
    pub(super) fn begin(stream: &UnixStream, terminal: bool) -> Result<Self> {
        let stream = stream.try_clone().context(|| "cannot share a socket".into())?;
        let out = Arc::new(Mutex::new(stream));
        let signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])
            .context(|| "cannot watch for signals".into())?;
        spawn("signals", {
            let out = Arc::clone(&out);
            move || pass_signals(signals, &out)
        })?;
        let (room, wanted) = mpsc::channel();
        spawn("stdin", {
            let out = Arc::clone(&out);
            move || pass_input(&wanted, &out)
        })?;
        let terminal = if terminal { Some(Raw::enter()?) } else { None };
        Ok(Self { out, room, terminal })
    }

    /// Rows and columns of the terminal, if the command shall have one.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.terminal.as_ref().map(|_| terminal_size())
    }

    /// Deals with a frame of a running command.
    pub(super) fn pass(&self, frame: &Frame) -> io::Result<()> {
        match frame {
            Frame::WantInput => drop(self.room.send(())),
            Frame::Stdout(bytes) => {
                let mut stdout = io::stdout().lock();
                // Nobody reads any more: the command shall notice as it would have noticed here.
                if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
                    send(&self.out, &Frame::StdoutClosed)?;
                }
            }
            // Like a program of this machine, the command cannot help it if stderr is closed.
            Frame::Stderr(bytes) => drop(io::stderr().lock().write_all(bytes)),
            _ => {}
        }
        Ok(())
    }
}

fn send(out: &Out, frame: &Frame) -> io::Result<()> {
    frame.send(&mut *out.lock().expect("no sender panics"))
}

fn pass_signals(mut signals: Signals, out: &Out) {
    for number in &mut signals {
        let frame = match number {
            SIGWINCH => {
                let (rows, columns) = terminal_size();
                Frame::Resize(rows, columns)
            }
            _ => Frame::Signal(number),
        };
        // Without a lab host there is nobody to signal; the receiver of frames says so.
        drop(send(out, &frame));
    }
}

fn pass_input(wanted: &Receiver<()>, out: &Out) {
    let mut stdin = io::stdin();
    while wanted.recv().is_ok() {
        let mut chunk = vec![0; CHUNK];
        let count = stdin.read(&mut chunk).unwrap_or(0);
        chunk.truncate(count);
        if send(out, &Frame::Input(chunk)).is_err() || count == 0 {
            return;
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .context(|| "cannot start a thread".into())
}

fn terminal_size() -> (u16, u16) {
    tcgetwinsize(io::stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// The terminal on stdin in raw mode; it gets its old mode back when this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context(|| "stdin is no terminal".into())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)
            .context(|| "cannot set the terminal up".into())?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
