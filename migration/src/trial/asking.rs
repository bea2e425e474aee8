//! Faults at every byte of the connection on which the source asks who has the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fake::{FakeGuest, FakeHost, Fault, LOW_PAGES, World};
use super::faults::{MESSAGE, assert_decided, moved};
use super::journeys::{Tried, try_moving};
use super::matrix::{hasty, try_each};
use super::network::{Break, Limits, Network};

/// Tries to move a guest over a connection that breaks as `first` says, and to ask over one that
/// breaks as `asking` says.
fn asked(first: Limits, asking: Limits) -> Tried {
    let world = Arc::<World>::default();
    let guest = FakeGuest::new(&world, Fault::None);
    let host = FakeHost { world: world.clone(), fault: Fault::None, low_pages: LOW_PAGES };
    try_moving(world, guest, host, Network::asked(first, asking), &hasty())
}

/// What came of all faults on the asking.
#[derive(Default)]
struct Ends {
    stayed: usize,
    arrived: usize,
}

/// Meets every fault on the asking, where `first` broke the migration.
fn whatever_the_asking_meets(first: Limits) -> Ends {
    let (out, back) = asked(first, Limits::NONE).passed;
    assert!(out > 2 * MESSAGE && back > MESSAGE, "{out} bytes out, {back} back: nobody asked");
    let (mut ends, again) = (Ends::default(), AtomicUsize::new(0));
    let check = |tried: &Tried, case: &str| {
        assert_decided(tried, case);
        again.fetch_add(usize::from(tried.connections > 2), Ordering::Relaxed);
    };
    for how in [Break::Shut, Break::Hole, Break::Flip, Break::Twice, Break::Swap, Break::Late] {
        // Who waits for what never comes, waits long.
        let step = if matches!(how, Break::Hole | Break::Swap) { 5 } else { 2 };
        let outs = (0..out).step_by(step).map(|out| Limits { out, back: usize::MAX, how });
        let backs = (0..back).step_by(step).map(|back| Limits { out: usize::MAX, back, how });
        let faults: Vec<_> = outs.chain(backs).collect();
        again.store(0, Ordering::Relaxed);
        let (stayed, arrived) = try_each(&faults, |asking| asked(first, *asking), check);
        ends = Ends { stayed: ends.stayed + stayed, arrived: ends.arrived + arrived };
        let (again, all) = (again.load(Ordering::Relaxed), faults.len());
        println!("{how:?}: {stayed} stayed, {arrived} arrived, in {again} it was asked again");
        match how {
            Break::Shut | Break::Hole | Break::Flip => assert!(again > all / 3, "{how:?}: {again}"),
            Break::Twice | Break::Swap | Break::Late => {}
        }
    }
    ends
}

#[test]
fn whoever_asks_about_a_guest_that_was_never_given_gets_it_back_whatever_happens() {
    let (out, _) = moved(Limits::NONE, None, &hasty()).passed;
    let commit_lost = Limits { out: out - 2 * MESSAGE, ..Limits::NONE };
    let Ends { stayed, arrived } = whatever_the_asking_meets(commit_lost);
    assert_eq!(arrived, 0, "{stayed} stayed");
}

#[test]
fn whoever_asks_about_a_guest_that_was_given_learns_where_it_is_whatever_happens() {
    let (_, back) = moved(Limits::NONE, None, &hasty()).passed;
    let running_lost = Limits { out: usize::MAX, back: back - MESSAGE, how: Break::Hole };
    let Ends { stayed, arrived } = whatever_the_asking_meets(running_lost);
    // It stays only where it was asked before it could start.
    assert!(arrived > stayed, "{stayed} stayed, {arrived} arrived");
}
