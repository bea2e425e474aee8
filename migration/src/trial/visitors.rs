//! Visitors of a destination that are not uvmm, or bring no guest.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::fake::{FakeGuest, FakeHost, Fault, LOW_PAGES, World, ram};
use super::journeys::{options, patience};
use super::network::{Door, Limits, Network};
use crate::answering::{Answering, Seat};
use crate::compat::{Offer, Profile, Rule};
use crate::destination::receive;
use crate::error::one_line;
use crate::guest::Departing;
use crate::handover::{Handover, TakingEvent, Token, Verdict};
use crate::patience::{Cancel, Patience};
use crate::policy::MOST_ROUNDS;
use crate::progress::{Progress, Watch};
use crate::ram::{PAGE, Run, layout};
use crate::record::NoRecord;
use crate::source::{Options, send};
use crate::state::{STATE_LIMIT, StateWriter};
use crate::wire::{Channel, Frame, Hello, Message, PeerError, Totals};

/// What a destination says that meets each of `acts` in turn, and then is told to stop.
fn visited(acts: Vec<Box<dyn FnOnce(UnixStream) + Send>>) -> (String, bool) {
    let world = Arc::<World>::default();
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (network, door) = Network::new(Limits::NONE, None);
    let cancel = Cancel::new();
    let wish = cancel.clone();
    let visitors = thread::Builder::new().spawn(move || {
        for act in acts {
            act(network.visit());
        }
        thread::sleep(Duration::from_millis(20));
        wish.cancel();
    });
    let mut patience = patience();
    patience.silence = Duration::from_millis(300);
    let progress = &mut |_: &Progress| {};
    let watch = Watch { progress, cancel, record: Box::new(NoRecord) };
    let failure = receive(&mut host, door, &patience, watch).err().unwrap();
    visitors.unwrap().join().unwrap();
    (one_line(&*failure), world.runners().1)
}

fn offer() -> Message {
    offer_over(1)
}

/// An offer of memory over this many connections.
pub(super) fn offer_over(streams: u8) -> Message {
    let offer = Offer {
        name: "fake".into(),
        config: vec![],
        profile: Profile::new().with("device", Rule::Eq, "lamp").with("cpus", Rule::Eq, 1),
        ram: layout(&ram(LOW_PAGES)),
    };
    Message::Offer { offer, dry_run: false, streams }
}

/// Speaks as a source whose offer was accepted.
fn source(stream: UnixStream) -> (Channel<UnixStream>, Token) {
    let mut peer = Channel::new(stream, Duration::from_secs(1), Cancel::new()).unwrap();
    peer.greet(Duration::from_secs(1)).unwrap();
    peer.send(&offer()).unwrap();
    match peer.receive_message(Duration::from_secs(1)).unwrap() {
        Message::Accepted(token) => (peer, token),
        other => panic!("{other:?}"),
    }
}

pub(super) fn run(page: u64, pages: u64) -> Run {
    Run { start: GuestAddress(page * PAGE), len: pages * PAGE }
}

#[test]
fn strangers_do_not_end_the_wait() {
    let (error, _) = visited(vec![
        Box::new(drop),
        Box::new(|mut stream| stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap()),
        Box::new(|mut stream| stream.write_all(&Hello { versions: (9, 9) }.encode()).unwrap()),
        Box::new(|stream| drop(source(stream))),
        Box::new(|stream| {
            let mut peer = Channel::new(stream, Duration::from_secs(1), Cancel::new()).unwrap();
            peer.greet(Duration::from_secs(1)).unwrap();
            peer.send(&Message::Query(Token::random().unwrap())).unwrap();
            let answer = peer.receive_message(Duration::from_secs(1)).unwrap();
            assert_eq!(answer, Message::Answer(Verdict::Unknown));
        }),
    ]);
    assert_eq!(error, "cancelled");
}

#[test]
fn memory_outside_of_memory_is_refused() {
    for outside in [run(LOW_PAGES, 1), run(LOW_PAGES - 1, 2), run(1 << 40, 1)] {
        let (error, _) = visited(vec![Box::new(move |stream| {
            let (mut peer, _) = source(stream);
            peer.send_zero(outside).unwrap();
            let said = peer
                .send(&Message::RoundEnd)
                .and_then(|()| peer.receive_message(Duration::from_secs(1)));
            assert!(matches!(said, Err(PeerError::GaveUp { .. })), "{said:?}");
        })]);
        assert!(error.contains("where no memory is"), "{error}");
    }
}

#[test]
fn commit_without_a_whole_guest_runs_nothing() {
    type Lie = fn(&mut Channel<UnixStream>, Token) -> Result<(), PeerError>;
    let lies: [(&str, Lie); 4] = [
        ("unexpected COMMIT", |peer, token| {
            peer.send_zero(run(0, 1))?;
            peer.send(&Message::Commit(token))
        }),
        ("only a part of the memory", |peer, token| {
            peer.send_zero(run(0, 1))?;
            peer.send_state(&[])?;
            peer.send(&Message::End(peer.totals()))?;
            peer.send(&Message::Commit(token))
        }),
        ("what arrived is not what was sent", |peer, token| {
            peer.send_zero(run(0, LOW_PAGES))?;
            peer.send_zero(Run { start: GuestAddress(1 << 32), len: 4 * PAGE })?;
            peer.send_state(&[])?;
            peer.send(&Message::End(Totals { pages: 1, ..peer.totals() }))?;
            peer.send(&Message::Commit(token))
        }),
        ("lacks counter", |peer, token| {
            peer.send_zero(run(0, LOW_PAGES))?;
            peer.send_zero(Run { start: GuestAddress(1 << 32), len: 4 * PAGE })?;
            peer.send_state(&[])?;
            peer.send(&Message::End(peer.totals()))?;
            peer.send(&Message::Commit(token))
        }),
    ];
    for (why, lie) in lies {
        let (error, ran) = visited(vec![Box::new(move |stream| {
            let (mut peer, token) = source(stream);
            let _sent = lie(&mut peer, token); // it may hang up on us
            while peer.receive(Duration::from_secs(1)).is_ok() {}
        })]);
        assert!(!ran);
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_source_that_stalls_keeps_nobody_for_ever() {
    let start = Instant::now();
    let (error, ran) = visited(vec![Box::new(|stream| {
        let (mut peer, _) = source(stream);
        peer.send_zero(run(0, 1)).unwrap();
        peer.flush().unwrap();
        while peer.receive(Duration::from_secs(1)).is_ok() {}
    })]);
    assert!(!ran && start.elapsed() < Duration::from_secs(10));
    assert!(error.contains("did not move for 0."), "{error}");
}

#[test]
fn a_state_that_drips_is_not_waited_for_for_ever() {
    let (error, ran) = visited(vec![Box::new(|stream| {
        let mut raw = stream.try_clone().unwrap();
        let (mut peer, _) = source(stream);
        peer.send_zero(run(0, 1)).unwrap();
        peer.flush().unwrap();
        raw.write_all(&Frame::State { len: 1000 }.encode()).unwrap();
        for _ in 0..900 {
            if raw.write_all(&[0]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(30));
        }
    })]);
    assert!(!ran);
    assert!(error.contains("was not done with the state after "), "{error}");
}

#[test]
fn a_source_that_drips_when_the_guest_runs_holds_nobody_up() {
    const DRIPS: Duration = Duration::from_secs(40);
    let world = Arc::<World>::default();
    let mut state = StateWriter::new();
    FakeGuest::new(&Arc::default(), Fault::None).save(&mut state).unwrap();
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (network, door) = Network::new(Limits::NONE, None);
    let visitor = thread::Builder::new().spawn(move || {
        let stream = network.visit();
        let mut raw = stream.try_clone().unwrap();
        let (mut peer, token) = source(stream);
        peer.send_zero(run(0, LOW_PAGES)).unwrap();
        peer.send_zero(Run { start: GuestAddress(1 << 32), len: 4 * PAGE }).unwrap();
        peer.send_state(state.bytes()).unwrap();
        peer.send(&Message::End(peer.totals())).unwrap();
        assert_eq!(peer.receive_message(DRIPS).unwrap(), Message::Ready(token));
        peer.send(&Message::Commit(token)).unwrap();
        assert_eq!(peer.receive_message(DRIPS).unwrap(), Message::Running(token));
        raw.write_all(&Frame::State { len: STATE_LIMIT }.encode()).unwrap();
        let start = Instant::now();
        while raw.write_all(&[0]).is_ok() && start.elapsed() < DRIPS {
            thread::sleep(Duration::from_millis(30));
        }
    });
    let (progress, cancel) = (&mut |_: &Progress| {}, Cancel::new());
    let watch = Watch { progress, cancel, record: Box::new(NoRecord) };
    let start = Instant::now();
    drop(receive(&mut host, door, &patience(), watch).unwrap());
    assert!(start.elapsed() < DRIPS / 2);
    assert!(world.runners().1);
    visitor.unwrap().join().unwrap();
}

/// What a destination says that is told to stop while it meets someone who goes on with `act` for
/// as long as it is not hung up on.
fn stopped_at(act: fn(&mut Channel<UnixStream>) -> Result<(), PeerError>) -> String {
    let world = Arc::<World>::default();
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (network, door) = Network::new(Limits::NONE, None);
    let (cancel, enough) = (Cancel::new(), Instant::now() + Duration::from_secs(60));
    let wish = cancel.clone();
    let visitor = thread::Builder::new().spawn(move || {
        let (mut peer, _) = source(network.visit());
        for number in 0.. {
            if number == 10_000 {
                wish.cancel();
            }
            if Instant::now() > enough || act(&mut peer).is_err() {
                break;
            }
        }
        Instant::now() < enough
    });
    let watch = Watch { progress: &mut |_| {}, cancel, record: Box::new(NoRecord) };
    let failure = receive(&mut host, door, &patience(), watch).err().unwrap();
    assert!(visitor.unwrap().join().unwrap(), "it was listened to for as long as it spoke");
    assert_eq!(world.runners(), (false, false));
    one_line(&*failure)
}

#[test]
fn a_destination_can_be_stopped_whatever_a_source_says_without_end() {
    assert_eq!(stopped_at(|peer| peer.send(&Message::Alive)), "cancelled");
    assert_eq!(stopped_at(|peer| peer.send_zero(run(0, LOW_PAGES))), "cancelled");
}

#[test]
fn passes_without_end_are_refused() {
    let (error, ran) = visited(vec![Box::new(|stream| {
        let (mut peer, _) = source(stream);
        peer.send_zero(run(0, 1)).unwrap();
        for _ in 0..30 * MOST_ROUNDS / 100 {
            let said = (0..100).try_for_each(|_| peer.send(&Message::RoundEnd));
            let heard = |_| peer.receive(Duration::from_secs(10)).map(drop);
            if said.is_err() || (0..100).try_for_each(heard).is_err() {
                return;
            }
        }
    })]);
    assert!(!ran);
    assert!(error.contains("more than 10000 passes"), "{error}");
}

#[test]
fn a_wrong_checksum_of_memory_is_noticed() {
    let (error, _) = visited(vec![Box::new(|stream| {
        let mut raw = stream.try_clone().unwrap();
        let (mut peer, _) = source(stream);
        let frame = Frame::Ram { run: run(0, 1), checked: true, packed: None };
        raw.write_all(&frame.encode()).unwrap();
        raw.write_all(&[5; 4096]).unwrap();
        raw.write_all(&(crc32fast::hash(&[5; 4096]) ^ 1).to_le_bytes()).unwrap();
        while peer.receive(Duration::from_secs(1)).is_ok() {}
    })]);
    assert!(error.contains("memory with a wrong checksum"), "{error}");
}

/// A destination that is ready, over `network`, and whether it was decided that it gets nothing.
fn ready(token: Token, door: Door, patience: Patience) -> (Answering, Cancel) {
    let mut handover = Handover::taking(token, Box::new(NoRecord));
    handover.advance(TakingEvent::Loaded).unwrap();
    let decided = Cancel::new();
    let desk = Answering::start(door, Seat::new(handover), patience, decided.clone());
    (desk.unwrap(), decided)
}

/// Many who connect and say nothing, or no more than who they are.
fn strangers(network: &Network, count: usize) -> Vec<UnixStream> {
    let visit = |number| {
        let mut stream = network.visit();
        if number % 2 == 1 {
            stream.write_all(&Hello::OURS.encode()).unwrap();
        }
        stream
    };
    (0..count).map(visit).collect()
}

#[test]
fn strangers_who_say_nothing_keep_nobody_from_asking() {
    for count in [12, 100] {
        let patience = Patience { running: Duration::from_secs(60), ..patience() };
        let (token, (network, door)) = (Token::random().unwrap(), Network::new(Limits::NONE, None));
        let (desk, decided) = ready(token, door, patience);
        let _strangers = strangers(&network, count);
        let second = Duration::from_secs(1);
        let mut peer = Channel::new(network.visit(), 30 * second, Cancel::new()).unwrap();
        peer.greet(30 * second).unwrap();
        peer.send(&Message::Query(token)).unwrap();
        let answer = peer.receive_message(30 * second).unwrap();
        assert_eq!(answer, Message::Answer(Verdict::Refused));
        assert!(decided.is_cancelled());
        peer.send(&Message::Done(token)).unwrap();
        desk.wait();
    }
}

#[test]
fn strangers_who_say_nothing_keep_no_guest_from_coming() {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::new(&world, Fault::None);
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (mut network, door) = Network::over(5, (0, Limits::NONE), None);
    let mut options = Options { streams: 5, ..options() };
    options.patience.greeting = Duration::from_secs(40);
    let waits = options.patience;
    let mut idle = strangers(&network, 12);
    let there = thread::Builder::new().spawn(move || {
        let progress = &mut |_: &Progress| {};
        let watch = Watch { progress, cancel: Cancel::new(), record: Box::new(NoRecord) };
        receive(&mut host, door, &waits, watch).map(drop)
    });
    let connect = |_: &Cancel| {
        idle.extend(strangers(&network, 4));
        network.connect()
    };
    let watch = Watch { progress: &mut |_| {}, cancel: Cancel::new(), record: Box::new(NoRecord) };
    send(&mut guest, connect, &options, watch).unwrap();
    there.unwrap().join().unwrap().unwrap();
    assert_eq!(world.runners(), (false, true));
}

#[test]
fn a_busy_destination_says_so() {
    let token = Token::random().unwrap();
    let (network, door) = Network::new(Limits::NONE, None);
    let (desk, decided) = ready(token, door, patience());
    let greeted = || {
        let mut peer =
            Channel::new(network.visit(), Duration::from_secs(1), Cancel::new()).unwrap();
        peer.greet(Duration::from_secs(1)).unwrap();
        peer
    };
    let mut peer = greeted();
    peer.send(&offer()).unwrap();
    let said = peer.receive_message(Duration::from_secs(1)).unwrap_err();
    assert!(matches!(said, PeerError::GaveUp { .. }), "{said}");

    let ask = |token| {
        let mut peer = greeted();
        peer.send(&Message::Query(token)).unwrap();
        (peer.receive_message(Duration::from_secs(1)).unwrap(), peer)
    };
    let (answer, _) = ask(Token::random().unwrap());
    assert_eq!(answer, Message::Answer(Verdict::Unknown));
    assert!(!decided.is_cancelled(), "who does not know the token decides nothing");
    let (answer, mut peer) = ask(token);
    assert_eq!(answer, Message::Answer(Verdict::Refused));
    assert!(decided.is_cancelled());
    peer.send(&Message::Done(token)).unwrap();
    desk.wait();
}
