//! The model check: both halves with their records, in every order of events.
//!
//! One source hands its guest over, up to [`ATTEMPTS`] times, each time to another destination.
//! The network delivers whatever was ever said, late, in any order, any number of times or never.
//! Either side crashes whenever it likes and comes back with nothing but its records. A disk
//! refuses to write, or writes and says that it did not. What decides is not modelled: it is
//! [`Handover`] itself, and [`may_boot`].

mod flaws;
mod letters;
mod paper;
mod world;

use stateright::{Checker, Model, Property};

use flaws::Flaw;
use world::{Act, World};

/// How often a source tries.
const ATTEMPTS: usize = 2;

/// Two sides and what may happen to them, all of it or with one rule broken.
struct Hosts {
    attempts: usize,
    flaw: Option<Flaw>,
}

impl Model for Hosts {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World::default()]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        world.acts(self.attempts, self.flaw, acts);
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let next = world.after(act, self.flaw);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two runners", |_, world: &World| world.runners() <= 1),
            Property::always("no run without COMMIT", |_, world: &World| world.was_committed()),
            Property::always("one runner once all can talk", |hosts: &Self, world: &World| {
                world.healed(hosts.flaw).runners() == 1
            }),
            Property::sometimes("the first attempt succeeds", |_, world: &World| world.ran(0)),
            Property::sometimes("another attempt succeeds", |_, world: &World| world.ran(1)),
            Property::sometimes("a guest comes back", |_, world: &World| world.came_back()),
            Property::sometimes("all is forgotten", |_, world: &World| world.is_forgotten()),
        ]
    }
}

#[test]
fn in_no_order_of_events_there_are_two_runners_or_none() {
    let hosts = Hosts { attempts: ATTEMPTS, flaw: None };
    let checker = hosts.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let states = checker.unique_state_count();
    println!("{states} states, at most {} steps away", checker.max_depth());
    assert!(states > 100_000, "{states} states are not all that there are");
}

#[test]
fn a_broken_rule_is_found() {
    for (flaw, property) in Flaw::ALL {
        let checker = Hosts { attempts: 1, flaw: Some(flaw) }.checker().spawn_bfs().join();
        let found = checker.discovery(property);
        let Some(path) = found else { panic!("nobody notices {flaw:?}") };
        let steps = path.into_actions().len();
        println!("{flaw:?}: \"{property}\" fails after {steps} steps");
    }
}
