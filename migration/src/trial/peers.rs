//! Destinations that are not uvmm, or not honest.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::fake::{FakeGuest, Fault, LOW_PAGES, World, ram};
use super::journeys::options;
use crate::compat::Mismatch;
use crate::error::{Error, one_line};
use crate::handover::{Token, Verdict};
use crate::patience::Cancel;
use crate::progress::Watch;
use crate::record::NoRecord;
use crate::report::Status;
use crate::source::send;
use crate::wire::{Channel, Frame, Hello, Message, Received, sum_of};
use proptest::prelude::*;
use vm_memory::GuestMemoryBackend;

/// What the source says after it met a peer that does `act`, having left the guest running.
fn met(act: impl FnOnce(UnixStream) + Send + 'static) -> String {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::new(&world, Fault::None);
    let mut act = Some(act);
    let mut peer = None;
    let connect = |_: &Cancel| {
        let (ours, theirs) = UnixStream::pair()?;
        let act = act.take().ok_or(std::io::ErrorKind::ConnectionRefused)?;
        peer = Some(thread::Builder::new().spawn(move || act(theirs))?);
        Ok(ours)
    };
    let mut options = options();
    options.patience.greeting = Duration::from_millis(100);
    options.patience.prepare = Duration::from_millis(100);
    options.patience.silence = Duration::from_millis(100);
    let watch = Watch { progress: &mut |_| {}, cancel: Cancel::new(), record: Box::new(NoRecord) };
    let start = Instant::now();
    let failure = send(&mut guest, connect, &options, watch).err().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2), "{failure}");
    assert_eq!(world.runners(), (true, false));
    assert_eq!(failure.report.status, Status::Failed);
    if let Some(peer) = peer {
        peer.join().unwrap();
    }
    one_line(&*failure)
}

/// Keeps the connection open until the other side hangs up.
fn linger(mut stream: UnixStream) {
    let _end = std::io::copy(&mut stream, &mut std::io::sink());
}

#[test]
fn a_peer_that_is_not_uvmm_is_named_by_its_first_words() {
    let error = met(|mut stream| {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        linger(stream);
    });
    let expected = "the peer at a local socket is not uvmm (its first bytes were \"HTTP/1.1 400 Bad\"): \
                    check the address";
    assert_eq!(error, expected);
    let error = met(|mut stream| stream.write_all(b"\x1b[2J").unwrap());
    assert!(error.contains("\"\\x1b[2J\""), "{error}");
}

#[test]
fn a_peer_of_another_version_is_told_apart() {
    let error = met(|mut stream| {
        stream.write_all(&Hello { versions: (7, 9) }.encode()).unwrap();
        linger(stream);
    });
    assert!(error.contains("in versions 7 to 9, this uvmm in 1 to 3: use the same"), "{error}");
}

#[test]
fn a_peer_that_says_nothing_or_hangs_up_is_given_up() {
    assert!(met(linger).contains("did not move for 0.1 s while greeting"));
    assert!(met(drop).contains("closed the connection while greeting"));
    let error = met(|mut stream| {
        stream.write_all(&Hello::OURS.encode()).unwrap();
        linger(stream);
    });
    assert!(error.contains("did not move for 0.1 s before it answered the offer"), "{error}");
}

#[test]
fn a_peer_that_drips_is_given_up_too() {
    let error = met(|mut stream| {
        stream.write_all(&Hello::OURS.encode()).unwrap();
        while stream.write_all(&[1]).is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(error.contains("a frame") || error.contains("did not move"), "{error}");
}

/// Speaks as a destination up to the offer.
fn destination(stream: UnixStream) -> Channel<UnixStream> {
    let mut peer = Channel::new(stream, Duration::from_secs(1), Cancel::new()).unwrap();
    peer.answer_greeting(Duration::from_secs(1)).unwrap();
    let offer = peer.receive_message(Duration::from_secs(1)).unwrap();
    assert!(matches!(offer, Message::Offer { dry_run: false, .. }));
    peer
}

#[test]
fn mismatches_from_a_liar_cannot_touch_the_terminal() {
    let error = met(|stream| {
        let evil = || "\x1b]0;owned\x07\n".repeat(300);
        let mismatch = Mismatch { path: evil(), wanted: evil(), found: evil(), remedy: evil() };
        destination(stream).send(&Message::Mismatched(vec![mismatch])).unwrap();
    });
    assert!(!error.chars().any(char::is_control), "{error:?}");
    assert!(error.chars().count() < 600);
    let error = met(|stream| destination(stream).give_up("\x1b[2J\n"));
    assert!(!error.chars().any(char::is_control), "{error:?}");
}

#[test]
fn a_message_at_the_wrong_time_ends_it() {
    let token = Token::random().unwrap();
    for early in [Message::Ready(token), Message::Running(token), Message::RoundTaken] {
        let error = met(move |stream| destination(stream).send(&early).unwrap());
        assert!(error.contains("sent an unexpected"), "{error}");
    }
    let error = met(move |stream| {
        let mut peer = destination(stream);
        peer.send(&Message::Accepted(token)).unwrap();
        peer.send(&Message::Running(token)).unwrap();
        while peer.receive(Duration::from_secs(1)).is_ok() {}
    });
    assert!(error.contains("unexpected RUNNING") || error.contains("closed"), "{error}");
}

#[test]
fn ready_for_another_migration_is_not_ready() {
    let error = met(|stream| {
        let mut peer = destination(stream);
        peer.send(&Message::Accepted(Token::random().unwrap())).unwrap();
        let memory = ram(LOW_PAGES);
        loop {
            match peer.receive(Duration::from_secs(1)).unwrap() {
                Received::Ram { run, checked, packed } => {
                    let size = usize::try_from(run.len).unwrap();
                    let slice = memory.get_slice(run.start, size).unwrap();
                    peer.read_ram(&slice, None, checked, packed).unwrap();
                }
                Received::Message(Message::RoundEnd) => {
                    peer.send(&Message::RoundTaken).unwrap();
                }
                Received::Message(Message::End(_)) => break,
                _ => {}
            }
        }
        peer.send(&Message::Ready(Token::random().unwrap())).unwrap();
    });
    assert!(error.contains("unexpected READY"), "{error}");
}

#[test]
fn nobody_there_is_an_error_that_says_what_to_check() {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::new(&world, Fault::None);
    let connect = |_: &Cancel| Err::<UnixStream, _>(std::io::ErrorKind::ConnectionRefused.into());
    let watch = Watch { progress: &mut |_| {}, cancel: Cancel::new(), record: Box::new(NoRecord) };
    let failure = send(&mut guest, connect, &options(), watch).err().unwrap();
    assert!(matches!(failure.error, Error::Connect(_)));
    let line = one_line(&*failure);
    assert!(line.ends_with("check the address, and that uvmm waits there: connection refused"));
}

#[test]
fn one_wrong_bit_cannot_turn_an_answer_into_another() {
    let bytes = postcard::to_stdvec(&Message::Answer(Verdict::Running)).unwrap();
    let header = Frame::Message { len: bytes.len() }.encode();
    let whole = [&header[..], &bytes[..], &sum_of(&header, &bytes)[..]].concat();
    let receive = |bytes: &[u8]| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut peer = Channel::new(ours, Duration::from_secs(1), Cancel::new()).unwrap();
        peer.receive_message(Duration::from_secs(1))
    };
    assert_eq!(receive(&whole).unwrap(), Message::Answer(Verdict::Running));
    for bit in 0..whole.len() * 8 {
        let mut wrong = whole.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(receive(&wrong).is_err(), "bit {bit}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn garbage_after_the_greeting_is_an_error(
        kind in 0..6u8,
        bytes in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[kind, 0]).unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut peer = Channel::new(ours, Duration::from_secs(1), Cancel::new()).unwrap();
        let mut received = 0;
        while peer.receive(Duration::from_secs(1)).is_ok() {
            received += 1;
            prop_assert!(received < 20);
        }
    }

    #[test]
    fn messages_that_do_not_decode_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let header = Frame::Message { len: bytes.len() }.encode();
        theirs.write_all(&header).unwrap();
        theirs.write_all(&bytes).unwrap();
        theirs.write_all(&sum_of(&header, &bytes)).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let mut peer = Channel::new(ours, Duration::from_secs(1), Cancel::new()).unwrap();
        if let Ok(message) = peer.receive_message(Duration::from_secs(1)) {
            let mut again = postcard::to_stdvec(&message).unwrap();
            again.truncate(1);
            prop_assert_eq!(&again[..], &bytes[..1]);
        }
    }
}
