//! Memory over several connections, any of which can break, come late, twice or never.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::fake::{FakeGuest, FakeHost, Fault, HIGH_PAGES, LOW_PAGES, World, ram};
use super::faults::assert_decided;
use super::journeys::{Tried, options, patience, try_moving};
use super::matrix::{hasty, try_each};
use super::network::{Break, Limits, Network};
use super::visitors::{offer_over, run};
use crate::destination::receive;
use crate::error::one_line;
use crate::handover::Token;
use crate::patience::Cancel;
use crate::progress::{Progress, Watch};
use crate::ram::{PAGE, Run, layout};
use crate::record::NoRecord;
use crate::source::Options;
use crate::wire::{Channel, Frame, MOST_STREAMS, Message, PeerError, Received, Totals};

const SECOND: Duration = Duration::from_secs(1);

/// Tries to move a guest of `pages` pages, half of which hold something, over `network`.
fn moved(pages: u64, streams: u8, cut: (usize, Limits), busy: bool) -> Tried {
    moved_with(pages, streams, cut, busy, options())
}

fn moved_with(
    pages: u64,
    streams: u8,
    cut: (usize, Limits),
    busy: bool,
    mut options: Options,
) -> Tried {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::with_memory(&world, Fault::None, pages);
    for page in (0..pages).filter(|page| page / 100 % 2 == 0) {
        guest.ram.write_obj(page + 1, GuestAddress(page * PAGE + page % 400 * 8 + 64)).unwrap();
    }
    if busy {
        guest.write_all_the_time(pages / 2, 300);
    }
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: pages };
    options.streams = streams;
    let network = Network::over(streams.into(), cut, Some(Limits::NONE));
    try_moving(world, guest, host, network, &options)
}

#[test]
fn a_busy_guest_arrives_over_any_number_of_connections() {
    for streams in [1, 2, 5, MOST_STREAMS] {
        let tried = moved(2000, streams, (0, Limits::NONE), true);
        tried.assert_there();
        let (sent, arrived) = (tried.sent.unwrap(), tried.arrived.unwrap().report);
        assert_eq!((sent.streams, arrived.streams), (streams, streams));
        assert_eq!(sent.bytes_sent, arrived.bytes_sent);
        assert_eq!((sent.pages, sent.zero_pages), (arrived.pages, arrived.zero_pages));
        assert!(sent.pages >= 1000, "{sent:?}");
    }
}

#[test]
fn every_connection_has_its_part() {
    // Slow enough for each to come to the queues before the others have emptied them.
    let options = Options { bandwidth_limit: Some(8 << 20), ..options() };
    for which in 0..3 {
        let tried = moved_with(4000, 3, (which, Limits::NONE), false, options);
        tried.assert_there();
        let (out, _) = tried.passed;
        assert!(out > 1 << 18, "only {out} bytes went over connection {which}");
    }
}

#[test]
fn any_connection_cut_anywhere_leaves_one_runner() {
    let (mut here, mut there) = (0, 0);
    for which in 0..3 {
        let (out, back) = moved(600, 3, (which, Limits::NONE), false).passed;
        let near = |total: usize| (0..total).filter(move |at| *at < 120 || at + 120 > total);
        let outs = near(out).step_by(17).chain((0..out).step_by(out / 6));
        let cut_out = outs.map(|out| Limits { out, ..Limits::NONE });
        let cut_back = (0..back).step_by(11).map(|back| Limits { back, ..Limits::NONE });
        for limits in cut_out.chain(cut_back) {
            let tried = moved(600, 3, (which, limits), false);
            assert_decided(&tried, &format!("connection {which}, {limits:?}"));
            if tried.arrived.is_ok() { there += 1 } else { here += 1 }
        }
    }
    assert!(here > 30 && there > 0, "{here} stayed, {there} arrived");
}

#[test]
fn what_is_wrong_twice_or_out_of_order_on_any_connection_leaves_one_runner() {
    let options = hasty();
    for which in [0, 2] {
        let (out, back) = moved_with(300, 3, (which, Limits::NONE), false, options).passed;
        let near = |total: usize| (0..total).filter(move |at| *at < 120 || at + 120 > total);
        for how in [Break::Flip, Break::Twice, Break::Swap] {
            let outs = near(out).step_by(29).chain((0..out).step_by(out / 4));
            let outs = outs.map(|out| Limits { out, back: usize::MAX, how });
            let backs = (0..back).step_by(17).map(|back| Limits { out: usize::MAX, back, how });
            let faults: Vec<_> = outs.chain(backs).collect();
            let bent = |limits: &Limits| moved_with(300, 3, (which, *limits), false, options);
            let (stayed, arrived) = try_each(&faults, bent, assert_decided);
            println!("connection {which}, {how:?}: {stayed} stayed, {arrived} arrived");
            assert!(stayed > 2, "connection {which}, {how:?}: {stayed}, {arrived} arrived");
        }
    }
}

#[test]
fn a_connection_that_falls_silent_ends_it_in_time() {
    for which in 1..3 {
        let start = Instant::now();
        let hole = Limits { out: 200_000, back: usize::MAX, how: Break::Hole };
        let options = Options { bandwidth_limit: Some(8 << 20), ..options() };
        let tried = moved_with(3000, 3, (which, hole), false, options);
        assert_decided(&tried, "a hole");
        assert_eq!(tried.world.runners(), (true, false));
        assert!(start.elapsed() < 60 * SECOND, "{:?}", start.elapsed());
    }
}

/// A source that a test plays, with an accepted offer of three connections.
struct Source {
    network: Network,
    peer: Channel<UnixStream>,
    token: Token,
}

impl Source {
    fn greeted(network: &Network) -> Channel<UnixStream> {
        let mut peer = Channel::new(network.visit(), SECOND, Cancel::new()).unwrap();
        peer.greet(SECOND).unwrap();
        peer
    }

    fn join(&self, token: Token, lane: u8) -> Result<Channel<UnixStream>, PeerError> {
        let mut peer = Self::greeted(&self.network);
        peer.send(&Message::Join { token, lane })?;
        match peer.receive_message(SECOND)? {
            Message::Joined => Ok(peer),
            other => panic!("{other:?}"),
        }
    }
}

/// What a destination says, and whether the guest ran there, that a source meets that does `act`.
fn met(act: impl FnOnce(Source) + Send + 'static) -> (Option<String>, bool) {
    met_within(30 * SECOND, act)
}

/// The same, where all connections have to come within `limit`.
fn met_within(
    limit: Duration,
    act: impl FnOnce(Source) + Send + 'static,
) -> (Option<String>, bool) {
    let world = Arc::<World>::default();
    let mut host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    let (network, door) = Network::new(Limits::NONE, None);
    let (cancel, mut patience) = (Cancel::new(), patience());
    (patience.greeting, patience.silence) = (limit, Duration::from_millis(400));
    let wish = cancel.clone();
    let source = thread::Builder::new().spawn(move || {
        let mut peer = Source::greeted(&network);
        peer.send(&offer_over(3)).unwrap();
        match peer.receive_message(SECOND).unwrap() {
            Message::Accepted(token) => act(Source { network, peer, token }),
            other => panic!("{other:?}"),
        }
        thread::sleep(Duration::from_millis(20));
        wish.cancel();
    });
    let progress = &mut |_: &Progress| {};
    let watch = Watch { progress, cancel, record: Box::new(NoRecord) };
    let arrived = receive(&mut host, door, &patience, watch);
    source.unwrap().join().unwrap();
    (arrived.err().map(|failure| one_line(&*failure)), world.runners().1)
}

fn high(pages: u64) -> Run {
    Run { start: GuestAddress(1 << 32), len: pages * PAGE }
}

/// Plays a whole migration with lanes that are there; `lie` about what the first of them carried.
fn whole(source: Source, lanes: [Channel<UnixStream>; 2], lie: fn(Totals) -> Totals) {
    whole_with(source, lanes, lie, 1);
}

/// The same, where the first connection carries so many pages itself.
fn whole_with(
    source: Source,
    mut lanes: [Channel<UnixStream>; 2],
    lie: fn(Totals) -> Totals,
    own: u64,
) {
    let Source { mut peer, token, .. } = source;
    assert_eq!(layout(&ram(LOW_PAGES)).len(), 2);
    let [one, two] = &mut lanes;
    if own > 0 {
        peer.send_zero(run(0, own)).unwrap();
        peer.flush().unwrap();
    }
    one.send_zero(run(own, LOW_PAGES - own)).unwrap();
    two.send_zero(high(HIGH_PAGES)).unwrap();
    for lane in [&mut *one, &mut *two] {
        lane.send(&Message::RoundEnd).unwrap();
    }
    peer.send(&Message::RoundEnd).unwrap();
    assert_eq!(peer.receive_message(SECOND).unwrap(), Message::RoundTaken);
    one.send(&Message::End(lie(one.totals()))).unwrap();
    two.send(&Message::End(two.totals())).unwrap();
    let _unheard = peer.send_state(&[]).and_then(|()| peer.send(&Message::End(peer.totals())));
    let _unheard = peer.send(&Message::Commit(token));
    while peer.receive(SECOND).is_ok() {}
}

#[test]
fn connections_may_come_in_any_order() {
    let (error, ran) = met(|source| {
        let two = source.join(source.token, 2).unwrap();
        let one = source.join(source.token, 1).unwrap();
        whole(source, [one, two], |totals| totals);
    });
    // All memory came; only the state of the machine was none.
    assert!(!ran);
    assert!(error.unwrap().contains("lacks counter"));
}

#[test]
fn the_first_connection_may_find_nothing_left_to_carry() {
    let (error, ran) = met(|source| {
        let lanes = [1, 2].map(|lane| source.join(source.token, lane).unwrap());
        whole_with(source, lanes, |totals| totals, 0);
    });
    assert!(!ran);
    assert!(error.unwrap().contains("lacks counter"));
}

#[test]
fn whoever_does_not_belong_to_it_joins_nothing() {
    let (error, _) = met(|source| {
        let refused = |token, lane| match source.join(token, lane) {
            Err(PeerError::GaveUp { .. }) => {}
            other => panic!("lane {lane}: {:?}", other.err()),
        };
        refused(Token::random().unwrap(), 1);
        drop(source.network.visit());
        refused(source.token, 0);
        refused(source.token, 3);
        let mut guest = Source::greeted(&source.network);
        guest.send(&offer_over(1)).unwrap();
        assert!(matches!(guest.receive_message(SECOND), Err(PeerError::GaveUp { .. })));
        let one = source.join(source.token, 1).unwrap();
        refused(source.token, 1);
        let two = source.join(source.token, 2).unwrap();
        whole(source, [one, two], |totals| totals);
    });
    assert!(error.unwrap().contains("lacks counter"));
}

#[test]
fn a_connection_that_never_comes_is_not_waited_for_for_ever() {
    let start = Instant::now();
    let (error, ran) = met_within(SECOND / 2, |mut source| {
        let _one = source.join(source.token, 1).unwrap();
        // The destination waits for another guest; this one learns nothing but the end.
        while source.peer.receive(SECOND).is_ok() {}
    });
    assert!(!ran && start.elapsed() < 30 * SECOND);
    assert_eq!(error.unwrap(), "cancelled");
}

#[test]
fn a_connection_may_have_nothing_to_carry_for_long() {
    let (error, _) = met(|mut source| {
        let [one, two] = [1, 2].map(|lane| source.join(source.token, lane).unwrap());
        for _ in 0..9 {
            source.peer.send_zero(run(0, 1)).unwrap();
            source.peer.flush().unwrap();
            thread::sleep(Duration::from_millis(100));
        }
        whole(source, [one, two], |totals| totals);
    });
    assert!(error.unwrap().contains("lacks counter"));
}

#[test]
fn a_connection_that_never_ends_is_given_up() {
    let start = Instant::now();
    let (error, ran) = met(|mut source| {
        let _lanes = [1, 2].map(|lane| source.join(source.token, lane).unwrap());
        source.peer.send_zero(run(0, LOW_PAGES)).unwrap();
        source.peer.send_state(&[]).unwrap();
        while source.peer.receive(SECOND).is_ok() {}
    });
    assert!(!ran && start.elapsed() < 30 * SECOND);
    assert_gave_up(&error.unwrap());
}

/// Whoever is the first to notice: the connection itself, or the one that waits for it.
fn assert_gave_up(error: &str) {
    let own = error.contains("did not move for 0.4 s while it sent memory");
    assert!(
        own || error.contains("was not done with its other connections after 0.4 s"),
        "{error}"
    );
}

#[test]
fn a_connection_that_drips_when_all_else_is_there_is_given_up() {
    let (error, ran) = met(|mut source| {
        let mut raw = source.network.visit();
        let mut one = Channel::new(raw.try_clone().unwrap(), SECOND, Cancel::new()).unwrap();
        one.greet(SECOND).unwrap();
        one.send(&Message::Join { token: source.token, lane: 1 }).unwrap();
        assert_eq!(one.receive_message(SECOND).unwrap(), Message::Joined);
        let mut two = source.join(source.token, 2).unwrap();
        two.send(&Message::End(two.totals())).unwrap();
        // Ends of passes that nobody made do not stand for the end.
        (0..9).for_each(|_| one.send(&Message::RoundEnd).unwrap());
        let frame = Frame::Ram { run: run(1, 1), checked: true, packed: None };
        raw.write_all(&frame.encode()).unwrap();
        source.peer.send_zero(run(0, 1)).unwrap();
        source.peer.send_state(&[]).unwrap();
        let hung_up = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(30));
            raw.write_all(&[0]).is_err()
        });
        assert!(hung_up, "it was listened to for as long as it spoke");
    });
    assert!(!ran);
    assert_gave_up(&error.unwrap());
}

#[test]
fn what_one_connection_lost_is_noticed() {
    let (error, ran) = met(|source| {
        let [one, two] = [1, 2].map(|lane| source.join(source.token, lane).unwrap());
        whole(source, [one, two], |totals| Totals { zero_pages: 1, ..totals });
    });
    assert!(!ran);
    assert!(error.unwrap().contains("unexpected END"));
}

#[test]
fn a_pass_ends_when_all_connections_have_ended_it() {
    let (error, ran) = met(|source| {
        let [mut one, _two] = [1, 2].map(|lane| source.join(source.token, lane).unwrap());
        let mut peer = source.peer;
        peer.send_zero(run(0, 1)).unwrap();
        one.send(&Message::RoundEnd).unwrap();
        peer.send(&Message::RoundEnd).unwrap();
        let answer = peer.receive(SECOND);
        assert!(!matches!(answer, Ok(Received::Message(Message::RoundTaken))), "too early");
    });
    assert!(!ran);
    assert!(error.unwrap().contains("was not done with a pass"));
}

#[test]
fn an_offer_of_no_or_too_many_connections_is_garbage() {
    for streams in [0, MOST_STREAMS + 1] {
        let (network, door) = Network::new(Limits::NONE, None);
        let mut peer = Channel::new(network.visit(), SECOND, Cancel::new()).unwrap();
        let cancel = Cancel::new();
        let wish = cancel.clone();
        let source = thread::Builder::new().spawn(move || {
            peer.greet(SECOND).unwrap();
            peer.send(&offer_over(streams)).unwrap();
            let answer = peer.receive_message(SECOND);
            wish.cancel();
            answer.is_err()
        });
        let world = Arc::<World>::default();
        let mut host = FakeHost { world, fault: Fault::None, low_pages: LOW_PAGES };
        let watch = Watch { progress: &mut |_| {}, cancel, record: Box::new(NoRecord) };
        assert!(receive(&mut host, door, &patience(), watch).is_err());
        assert!(source.unwrap().join().unwrap(), "{streams} connections were accepted");
    }
}
