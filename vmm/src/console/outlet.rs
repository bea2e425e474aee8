//! Where the guest's output goes: written at once if there is room, and never waited for long.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::termios::isatty;
use vmm_sys_util::eventfd::EventFd;

/// How much output is kept for a reader that is slow or not there yet; older bytes go first.
const BACKLOG_MAX: usize = 64 << 10;
/// How long a vCPU waits for a standard output that is full, before output is lost.
const STALL_MAX: Duration = Duration::from_secs(1);

/// The guest's output, for the serial device to write to.
///
/// Writing always succeeds and never blocks for longer than a second in all: a reader that does
/// not keep up loses output, and the guest goes on.
#[derive(Debug, Clone)]
pub struct Output(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    outlet: Mutex<Outlet>,
    /// Tells the event loop that the backlog wants to be written.
    wake: EventFd,
}

/// A place for output, and what did not fit into it yet.
#[derive(Debug)]
pub(super) struct Outlet {
    target: Target,
    backlog: VecDeque<u8>,
    /// The reader had its [`STALL_MAX`] and is not waited for again until it caught up.
    stalled: bool,
    /// Writing failed for good. The descriptor stays open, since the event loop may watch it.
    broken: bool,
}

#[derive(Debug)]
pub(super) enum Target {
    Null,
    File(File),
    /// A pipe, a terminal, a file: whatever standard output is. It is shared with other
    /// processes, so it cannot be made non-blocking.
    Stream(OwnedFd),
    Client(Option<UnixStream>),
}

impl Output {
    pub(super) fn new(target: Target) -> io::Result<Self> {
        let outlet = Outlet { target, backlog: VecDeque::new(), stalled: false, broken: false };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Output(Arc::new(Shared { outlet: Mutex::new(outlet), wake })))
    }

    pub(super) fn outlet(&self) -> MutexGuard<'_, Outlet> {
        self.0.outlet.lock().expect("nothing panics while it holds the serial output")
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut outlet = self.outlet();
        let waited_for = outlet.wants_room();
        outlet.put(bytes);
        if outlet.wants_room() && !waited_for {
            self.0.wake.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet {
    fn put(&mut self, bytes: &[u8]) {
        if self.broken || matches!(self.target, Target::Null) {
            return;
        }
        for chunk in bytes.chunks(4096) {
            if self.backlog.len() + chunk.len() > BACKLOG_MAX {
                self.wait_for_reader(BACKLOG_MAX - chunk.len());
                let excess = (self.backlog.len() + chunk.len()).saturating_sub(BACKLOG_MAX);
                self.backlog.drain(..excess);
            }
            self.backlog.extend(chunk);
            self.flush();
        }
    }

    /// Gives a standard output that is full a moment to take some, once.
    fn wait_for_reader(&mut self, room: usize) {
        let deadline = Instant::now() + STALL_MAX;
        while self.backlog.len() > room && !self.stalled {
            let Target::Stream(fd) = &self.target else { return };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.stalled = true;
                tracing::warn!("nobody reads the serial output: the oldest of it is lost");
            } else if is_writable(fd, left) {
                self.flush();
            }
        }
    }

    /// Writes what can be written without waiting.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (bytes, _) = self.backlog.as_slices();
            match self.target.write(bytes) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => self.fail(error),
            }
        }
        self.stalled = false;
        self.backlog.shrink_to(1024);
    }

    /// The guest goes on without a place that broke; a socket's next client makes it good.
    fn fail(&mut self, error: Errno) {
        if let Target::Client(client) = &mut self.target {
            *client = None;
        } else {
            tracing::warn!("the serial output is lost from here on: cannot write it: {error}");
            self.broken = true;
            self.backlog = VecDeque::new();
        }
    }

    /// The descriptor to watch until it takes more, if that is all that is missing.
    pub(super) fn wants_room(&self) -> bool {
        let connected = matches!(self.target, Target::Stream(_) | Target::Client(Some(_)));
        connected && !self.backlog.is_empty()
    }

    /// Standard output's descriptor.
    pub(super) fn stream_fd(&self) -> Option<RawFd> {
        match &self.target {
            Target::Stream(fd) => Some(fd.as_raw_fd()),
            _ => None,
        }
    }

    /// Whether a client is connected.
    pub(super) fn has_client(&self) -> bool {
        matches!(self.target, Target::Client(Some(_)))
    }

    /// Gives the backlog and all that follows to this client, or keeps it for the next one.
    pub(super) fn set_client(&mut self, client: Option<UnixStream>) {
        self.target = Target::Client(client);
        self.flush();
    }
}

impl Target {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Target::Null => Ok(bytes.len()),
            Target::File(file) => rustix::io::write(file, bytes),
            Target::Stream(fd) => {
                if !is_writable(fd, Duration::ZERO) {
                    return Err(Errno::AGAIN);
                }
                // What poll(2) calls writable takes a whole PIPE_BUF if it is a pipe, but
                // perhaps no more than one byte if it is a terminal.
                let chunk = if isatty(&fd) { 1 } else { 4096 };
                rustix::io::write(fd, &bytes[..bytes.len().min(chunk)])
            }
            Target::Client(Some(client)) => {
                send(client, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Target::Client(None) => Err(Errno::AGAIN),
        }
    }
}

/// The last lines of a guest are worth a moment.
impl Drop for Outlet {
    fn drop(&mut self) {
        self.stalled = false;
        self.wait_for_reader(0);
    }
}

fn is_writable(fd: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap_or_default();
    let mut fds = [PollFd::new(fd, PollFlags::OUT)];
    matches!(poll(&mut fds, Some(&limit)), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::thread;

    #[test]
    fn a_full_disk_does_not_disturb_the_guest() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut output = Output::new(Target::File(full)).unwrap();
        for _ in 0..3 {
            output.write_all(b"lost\n").unwrap();
        }
        assert!(output.outlet().broken);
    }

    #[test]
    fn a_reader_that_stalls_costs_the_guest_a_second_once() {
        let (reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(Target::Stream(writer.into())).unwrap();
        let began = Instant::now();
        for _ in 0..20_000 {
            output.write_all(b"0123456789abcdef").unwrap();
        }
        let took = began.elapsed();
        assert!(took >= STALL_MAX && took < 3 * STALL_MAX, "{took:?}");
        assert!(output.outlet().wants_room());
        output.wake().read().expect("the event loop was told");
        drop(reader);
    }

    #[test]
    fn a_slow_reader_gets_everything() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = Output::new(Target::Stream(writer.into())).unwrap();
        let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let received = thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let mut received = Vec::new();
                thread::sleep(Duration::from_millis(100));
                reader.read_to_end(&mut received).unwrap();
                received
            });
            for chunk in sent.chunks(100) {
                output.write_all(chunk).unwrap();
            }
            drop(output);
            reading.join().unwrap()
        });
        assert!(received == sent);
    }

    #[test]
    fn without_a_client_the_latest_output_is_kept() {
        let mut output = Output::new(Target::Client(None)).unwrap();
        for number in 0..100_000u32 {
            writeln!(output, "{number:07}").unwrap();
        }
        let (near, mut far) = UnixStream::pair().unwrap();
        output.outlet().set_client(Some(near));
        let mut received = String::new();
        while output.outlet().wants_room() {
            let mut chunk = [0; 4096];
            let count = far.read(&mut chunk).unwrap();
            received.push_str(str::from_utf8(&chunk[..count]).unwrap());
            output.outlet().flush();
        }
        output.outlet().set_client(None);
        far.read_to_string(&mut received).unwrap();
        assert_eq!(received.len(), BACKLOG_MAX);
        assert!(received.ends_with("0099998\n0099999\n"));
    }
}
