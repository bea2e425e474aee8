//! Connecting, without a wait that has no bound or that heeds nobody.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

use super::stream::tune;
use crate::patience::{Cancel, TICK};

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Connects to `address`, such as `("host", 4444)`, within `limit` and unless `cancel` is wished.
///
/// That is for finding out what the name means, and for all that it means together: none of several
/// addresses takes the time of those behind it.
pub fn connect_tcp(
    address: impl ToSocketAddrs + Send + 'static,
    limit: Duration,
    cancel: &Cancel,
) -> io::Result<TcpStream> {
    let until = Instant::now() + limit;
    let addresses = resolve(address, until, cancel)?;
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for (untried, address) in (1..=addresses.len()).rev().zip(&addresses) {
        let now = Instant::now();
        let share = until.saturating_duration_since(now).div_f64(untried as f64);
        match connect_one(address, now + share, cancel) {
            Ok(stream) => {
                tune(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
        heed(cancel)?;
    }
    Err(last)
}

/// Looks a name up on a thread that is left behind if it does not come back in time: resolvers have
/// bounds of their own, but theirs are longer.
fn resolve(
    address: impl ToSocketAddrs + Send + 'static,
    until: Instant,
    cancel: &Cancel,
) -> io::Result<Vec<SocketAddr>> {
    let (tell, told) = channel();
    Builder::new().name("resolver".into()).spawn(move || {
        let _too_late = tell.send(address.to_socket_addrs().map(Iterator::collect));
    })?;
    loop {
        match told.recv_timeout(TICK) {
            Ok(addresses) => return addresses,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(io::Error::other("the name was not resolved"));
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() >= until => {
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    "the name was not resolved in time",
                ));
            }
            Err(RecvTimeoutError::Timeout) => heed(cancel)?,
        }
    }
}

fn connect_one(address: &SocketAddr, until: Instant, cancel: &Cancel) -> io::Result<TcpStream> {
    const LOOK_UP: Timespec = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos() as i64 };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, FLAGS, None)?;
    match connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    while poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&LOOK_UP))? == 0 {
        heed(cancel)?;
        if Instant::now() >= until {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    sockopt::socket_error(&socket)??;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connects to the Unix socket at `path` within `limit` and unless `cancel` is wished.
///
/// A plain connect waits for as long as the listener's queue is full, which may be for ever, so it
/// is tried without waiting instead.
pub fn connect_unix(
    path: impl AsRef<Path>,
    limit: Duration,
    cancel: &Cancel,
) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path.as_ref())?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    let began = Instant::now();
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if began.elapsed() < limit => thread::sleep(TICK),
            Err(Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
        heed(cancel)?;
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn heed(cancel: &Cancel) -> io::Result<()> {
    if cancel.is_cancelled() { Err(io::Error::other("nobody wants it any more")) } else { Ok(()) }
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
        connect_tcp(address, 5 * SECOND, &Cancel::new()).unwrap_err();
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
        assert!(connect_tcp(name, 30 * SECOND, &Cancel::new()).unwrap().nodelay().unwrap());
        let error = connect_tcp(Name(vec![]), SECOND, &Cancel::new()).unwrap_err();
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
        let error = connect_tcp(Unanswered, SECOND / 10, &Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_queue_that_stays_full_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _queued = connect_unix(&path, 30 * SECOND, &Cancel::new()).unwrap();
        let error = connect_unix(&path, SECOND / 10, &Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let room = Builder::new().spawn(move || {
            thread::sleep(SECOND / 5);
            listener.accept().map(|_| listener)
        });
        connect_unix(&path, 30 * SECOND, &Cancel::new()).unwrap();
        drop(room.unwrap().join().unwrap().unwrap());
    }

    #[test]
    fn a_wish_to_stop_is_heeded_while_nobody_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&unix, 0).unwrap();
        let _queued = connect_unix(&path, 30 * SECOND, &Cancel::new()).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&tcp, 0).unwrap();
        let address = tcp.local_addr().unwrap();
        let queue = || connect_tcp(address, SECOND / 5, &Cancel::new());
        let _queued: Vec<_> = std::iter::from_fn(|| queue().ok()).collect();

        let (cancel, start) = (Cancel::new(), Instant::now());
        cancel.cancel();
        connect_tcp(Unanswered, 60 * SECOND, &cancel).unwrap_err();
        connect_tcp(address, 60 * SECOND, &cancel).unwrap_err();
        connect_unix(&path, 60 * SECOND, &cancel).unwrap_err();
        assert!(start.elapsed() < 30 * SECOND);
    }
}
