//! Connecting, without a wait that has no bound.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::stream::tune;
use crate::patience::TICK;

/// Connects to `address`, such as `("host", 4444)`, within `limit`.
///
/// That is for finding out what the name means, and for all that it means together: none of several
/// addresses takes the time of those behind it.
pub fn connect_tcp(
    address: impl ToSocketAddrs + Send + 'static,
    limit: Duration,
) -> io::Result<TcpStream> {
    let until = Instant::now() + limit;
    let addresses = resolve(address, limit)?;
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for (untried, address) in (1..=addresses.len()).rev().zip(&addresses) {
        let share = until.saturating_duration_since(Instant::now()).div_f64(untried as f64);
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => {
                tune(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Looks a name up on a thread that is left behind if it does not come back in time: resolvers have
/// bounds of their own, but theirs are longer.
fn resolve(
    address: impl ToSocketAddrs + Send + 'static,
    limit: Duration,
) -> io::Result<Vec<SocketAddr>> {
    let (tell, told) = channel();
    Builder::new().name("resolver".into()).spawn(move || {
        let _too_late = tell.send(address.to_socket_addrs().map(Iterator::collect));
    })?;
    told.recv_timeout(limit).unwrap_or_else(|error| {
        Err(match error {
            RecvTimeoutError::Timeout => {
                io::Error::new(ErrorKind::TimedOut, "the name was not resolved in time")
            }
            RecvTimeoutError::Disconnected => io::Error::other("the name was not resolved"),
        })
    })
}

/// Connects to the Unix socket at `path` within `limit`.
///
/// A plain connect waits for as long as the listener's queue is full, which may be for ever, so it
/// is tried without waiting instead.
pub fn connect_unix(path: impl AsRef<Path>, limit: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path.as_ref())?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let began = Instant::now();
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if began.elapsed() < limit => thread::sleep(TICK),
            Err(Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::vec;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn connecting_to_nobody_is_an_error_in_time() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let start = Instant::now();
        connect_tcp(address, 5 * SECOND).unwrap_err();
        assert!(start.elapsed() < 30 * SECOND);
    }

    /// A name of several addresses.
    struct Name(Vec<SocketAddr>);

    impl ToSocketAddrs for Name {
        type Iter = vec::IntoIter<SocketAddr>;
        fn to_socket_addrs(&self) -> io::Result<Self::Iter> {
            Ok(self.0.clone().into_iter())
        }
    }

    #[test]
    fn every_address_of_a_name_is_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let name = Name(vec![nobody, listener.local_addr().unwrap()]);
        assert!(connect_tcp(name, 30 * SECOND).unwrap().nodelay().unwrap());
        let error = connect_tcp(Name(vec![]), SECOND).unwrap_err();
        assert_eq!(error.to_string(), "the name has no address");
    }

    /// A name that nobody answers for.
    struct Unanswered;

    impl ToSocketAddrs for Unanswered {
        type Iter = vec::IntoIter<SocketAddr>;
        fn to_socket_addrs(&self) -> io::Result<Self::Iter> {
            loop {
                thread::park();
            }
        }
    }

    #[test]
    fn a_resolver_that_hangs_is_not_waited_for_for_ever() {
        let error = connect_tcp(Unanswered, SECOND / 10).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_queue_that_stays_full_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _queued = connect_unix(&path, 30 * SECOND).unwrap();
        let error = connect_unix(&path, SECOND / 10).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let room = Builder::new().spawn(move || {
            thread::sleep(SECOND / 5);
            listener.accept().map(|_| listener)
        });
        connect_unix(&path, 30 * SECOND).unwrap();
        drop(room.unwrap().join().unwrap().unwrap());
    }
}
