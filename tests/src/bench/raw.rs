//! What sockets alone can do: the same bytes between two mappings, with nothing around it.
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use crate::error::{Context, Result};

/// What one write offers to the socket.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;

/// Seconds to copy `bytes` over `streams` loopback connections into memory that is fresh, as that
/// of a destination is.
pub(super) fn copy(bytes: usize, streams: usize) -> Result<f64> {
    let source = vec![0xa5_u8; bytes];
    // Zeroed memory of this size comes straight from the kernel: nothing of it is there yet.
    let mut destination = vec![0_u8; bytes];
    let part = bytes.div_ceil(streams);
    let mut pairs = Vec::new();
    for _ in 0..streams {
        pairs.push(connected().context(|| "cannot connect to this machine itself".into())?);
    }
    let since = Instant::now();
    let copied = thread::scope(|scope| {
        let parts = source.chunks(part).zip(destination.chunks_mut(part)).zip(pairs);
        let threads: Vec<_> = parts
            .flat_map(|((from, to), (mut out, mut into))| {
                let send = move || from.chunks(CHUNK).try_for_each(|chunk| out.write_all(chunk));
                [scope.spawn(send), scope.spawn(move || into.read_exact(to))]
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("copying does not panic"))
    });
    let seconds = since.elapsed().as_secs_f64();
    copied.context(|| "cannot copy over a socket".into())?;
    let there = destination.iter().step_by(PAGE).all(|&byte| byte == 0xa5);
    assert!(there, "a copy that is none is no measure");
    Ok(seconds)
}

fn connected() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let out = TcpStream::connect(listener.local_addr()?)?;
    Ok((out, listener.accept()?.0))
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_are_copied_by_any_number_of_streams() {
        for streams in [1, 2, 3] {
            assert!(super::copy(1 << 20, streams).unwrap() > 0.0);
        }
    }
}
