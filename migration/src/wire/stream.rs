//! The sockets that a migration runs over.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use vm_memory::{ReadVolatile, WriteVolatile};

/// A connection whose reads and writes can be bounded in time.
pub trait Stream: Read + Write + ReadVolatile + WriteVolatile + Send {
    /// Makes a single read or write that waits longer than `limit` fail, with an error of kind
    /// `WouldBlock` or `TimedOut`.
    fn set_timeout(&self, limit: Duration) -> io::Result<()>;

    /// Who is at the other end, for errors.
    fn peer(&self) -> String;

    /// The socket, if there is nothing else between the two ends.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The same, if files can be passed over it.
    fn local(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Something that connections arrive at.
pub trait Listener: Send {
    /// What arrives.
    type Stream: Stream;

    /// Waits at most `wait` for a connection.
    fn accept(&self, wait: Duration) -> io::Result<Option<Self::Stream>>;
}

impl Stream for TcpStream {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }

    fn peer(&self) -> String {
        self.peer_addr().map_or_else(|_| "an unknown address".into(), |address| address.to_string())
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Stream for UnixStream {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }

    fn peer(&self) -> String {
        "a local socket".into()
    }

    fn local(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

/// A file as one end: what is read was written before.
impl Stream for File {
    fn set_timeout(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn peer(&self) -> String {
        "a file".into()
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn accept(&self, wait: Duration) -> io::Result<Option<TcpStream>> {
        if !readable(self, wait)? {
            return Ok(None);
        }
        let Some((stream, _)) = arrived(TcpListener::accept(self))? else { return Ok(None) };
        tune(&stream)?;
        Ok(Some(stream))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn accept(&self, wait: Duration) -> io::Result<Option<UnixStream>> {
        if !readable(self, wait)? {
            return Ok(None);
        }
        Ok(arrived(UnixListener::accept(self))?.map(|(stream, _)| stream))
    }
}

/// Listens at `address`, such as `0.0.0.0:4444`.
pub fn listen_tcp(address: impl ToSocketAddrs) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    // Someone who hangs up between poll and accept must not leave us waiting in accept.
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Sends small frames at once, and notices within half a minute that the other host is gone.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(())
}

fn readable(listener: &impl AsFd, wait: Duration) -> io::Result<bool> {
    let wait = Timespec::try_from(wait).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut fds, Some(&wait)) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}

/// What of a failed accept is the trouble of the one who hung up.
fn arrived<T>(accepted: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    match accepted {
        Ok(connection) => Ok(Some(connection)),
        Err(error) => match error.kind() {
            ConnectionAborted | ConnectionReset | Interrupted | WouldBlock => Ok(None),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::Cancel;
    use crate::wire::{Channel, connect_tcp};

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn two_sides_greet_each_other_over_tcp() {
        let listener = listen_tcp("127.0.0.1:0").unwrap();
        assert!(Listener::accept(&listener, Duration::from_millis(1)).unwrap().is_none());
        let stream = connect_tcp(listener.local_addr().unwrap(), SECOND, &Cancel::new()).unwrap();
        assert!(stream.nodelay().unwrap());
        let arrived = Listener::accept(&listener, SECOND).unwrap().unwrap();
        let there = std::thread::Builder::new()
            .spawn(move || Channel::new(arrived, SECOND, Cancel::new())?.answer_greeting(SECOND));
        Channel::new(stream, SECOND, Cancel::new()).unwrap().greet(SECOND).unwrap();
        there.unwrap().join().unwrap().unwrap();
    }
}
