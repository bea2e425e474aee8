//! Echo requests, many a second, and how long none of them was answered (RFC 792).
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket};

use crate::error::{Context, Error, Result};

const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;
const IDENTIFIER: u16 = 0x7576;

/// Pings until it is told to stop.
#[derive(Debug)]
pub struct Pinger {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Answers>>,
}

/// What came of the pings.
#[derive(Debug, Clone, Copy)]
pub struct Answers {
    /// Requests.
    pub sent: u32,
    /// Requests that were answered.
    pub answered: u32,
    /// The longest time between two answers.
    pub outage: Duration,
}

impl Pinger {
    /// Pings `address` every `interval`.
    ///
    /// # Errors
    /// If this process may not.
    pub fn start(address: Ipv4Addr, interval: Duration) -> Result<Self> {
        let fd = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))
            .context(|| "cannot open a raw socket".into())?;
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = Builder::new()
            .name("ping".into())
            .spawn(move || ping(&fd, address, interval, &stopped))
            .context(|| "cannot start a thread".into())?;
        Ok(Self { stop, thread })
    }

    /// Stops; gives what came of it.
    ///
    /// # Errors
    /// If the socket broke.
    pub fn finish(self) -> Result<Answers> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| Error::Guest("the thread that pings broke".into()))?
    }
}

fn ping(fd: &OwnedFd, to: Ipv4Addr, interval: Duration, stop: &AtomicBool) -> Result<Answers> {
    let mut answers = Answers { sent: 0, answered: 0, outage: Duration::ZERO };
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let next = Instant::now() + interval;
        // While there is no way to the guest, sending can fail: that is an outage as well.
        let to_guest = SocketAddrV4::new(to, 0);
        let _ = sendto(fd, &request(answers.sent), SendFlags::empty(), &to_guest);
        answers.sent += 1;
        while let Some(left) = next.checked_duration_since(Instant::now()) {
            if is_answered(fd, to, left)? {
                answers.answered += 1;
                answers.outage = answers.outage.max(last.elapsed());
                last = Instant::now();
            }
        }
    }
    answers.outage = answers.outage.max(last.elapsed());
    Ok(answers)
}

fn request(sequence: u32) -> [u8; HEADER] {
    let [s0, s1, ..] = sequence.to_le_bytes();
    let [i0, i1] = IDENTIFIER.to_be_bytes();
    let mut packet = [ECHO, 0, 0, 0, i0, i1, s1, s0];
    let words = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded & 0xffff).unwrap_or(0);
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// Waits for an answer of `from`, `limit` at most.
fn is_answered(fd: &OwnedFd, from: Ipv4Addr, limit: Duration) -> Result<bool> {
    let limit = Timespec::try_from(limit).unwrap_or_default();
    let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit));
    if ready.context(|| "cannot wait for an answer".into())? == 0 {
        return Ok(false);
    }
    let mut buffer = [MaybeUninit::uninit(); 256];
    let ((packet, _), _) =
        recv(fd, &mut buffer, RecvFlags::DONTWAIT).context(|| "cannot receive".into())?;
    // The IP header comes first: its length in words, the source at 12.
    let header = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    let is_from = packet.get(12..16) == Some(&from.octets());
    let identifier = packet.get(header + 4..header + 6) == Some(&IDENTIFIER.to_be_bytes());
    Ok(is_from && identifier && packet.get(header) == Some(&ECHO_REPLY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_sums_up_to_ones() {
        for sequence in [0, 1, 0xffff, 0x1_2345] {
            let packet = request(sequence);
            let words = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
            let sum: u32 = words.sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{sequence}");
        }
    }
}
