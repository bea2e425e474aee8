//! Who may run the guest.
//!
//! Two small machines, one at each side, decide it. Nothing else does: the source gives the guest
//! back to its vCPUs only in a state that says so, and the destination lets it run only on the
//! one event that allows it.
//!
//! ```text
//! source         Mine ──commit──► Asked ──Running──► Given        destination   Empty
//! may run in:     │                 │                                             │loaded
//! Mine, Back      │                 └────Refused───► Back                         ▼
//!                 └─ any failure: stays Mine                     lost, queried  Ready ──commit──► Running
//!                                                                      └──────────┴─────► Dead ◄────┘ could not start
//! ```
//!
//! `Asked` is entered before the first byte of COMMIT may leave, and left only by the word of the
//! destination, which by then has made it come true. `Running` and `Dead` are for ever.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::record::{Record, Role};

/// Names one migration. Secret: whoever knows it can bind a destination never to run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token([u8; 16]);

impl Token {
    /// A token that nobody can guess.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({self})")
    }
}

impl FromStr for Token {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "a token is 32 hexadecimal digits";
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(WRONG);
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| WRONG)
    }
}

/// What a destination says when it is asked who has the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It runs here.
    Running,
    /// It never runs here.
    Refused,
    /// No migration of that name is known here. Says nothing about the guest.
    Unknown,
}

/// The source's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Giving {
    /// The guest is ours.
    Mine,
    /// COMMIT may have left: only the destination knows.
    Asked,
    /// It runs at the destination.
    Given,
    /// The destination will never run it: it is ours again.
    Back,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivingEvent {
    /// About to send COMMIT.
    Commit,
    /// The destination answered, to COMMIT or to a query.
    Heard(Verdict),
}

/// The destination's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Taking {
    /// Not all is here.
    Empty,
    /// All is here and could run.
    Ready,
    /// It runs here.
    Running,
    /// It never runs here.
    Dead,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakingEvent {
    /// Everything is loaded.
    Loaded,
    /// COMMIT arrived.
    Commit,
    /// No vCPU could be started.
    CouldNotStart,
    /// Someone asks who has the guest.
    Queried,
    /// The source is lost, or we give up.
    Lost,
}

impl Giving {
    /// What `event` makes of it. Events that do not fit change nothing.
    #[must_use]
    pub fn after(self, event: GivingEvent) -> Self {
        match (self, event) {
            (Self::Mine, GivingEvent::Commit) => Self::Asked,
            (Self::Asked, GivingEvent::Heard(Verdict::Running)) => Self::Given,
            (Self::Asked, GivingEvent::Heard(Verdict::Refused)) => Self::Back,
            (state, GivingEvent::Commit | GivingEvent::Heard(_)) => state,
        }
    }

    /// Whether the guest may run at the source.
    #[must_use]
    pub fn may_run(self) -> bool {
        matches!(self, Self::Mine | Self::Back)
    }
}

impl Taking {
    /// What `event` makes of it. Events that do not fit change nothing.
    #[must_use]
    pub fn after(self, event: TakingEvent) -> Self {
        match (self, event) {
            (Self::Empty, TakingEvent::Loaded) => Self::Ready,
            (Self::Ready, TakingEvent::Commit) => Self::Running,
            (Self::Running, TakingEvent::CouldNotStart)
            | (Self::Empty | Self::Ready, TakingEvent::Queried | TakingEvent::Lost) => Self::Dead,
            (state, _) => state,
        }
    }

    /// Whether the guest may run at the destination.
    #[must_use]
    pub fn may_run(self) -> bool {
        self == Self::Running
    }

    /// What to tell whoever asks; asking decides it, so there is always an answer.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        if self.may_run() { Verdict::Running } else { Verdict::Refused }
    }
}

/// A half that is written down before it changes.
pub struct Handover<T> {
    state: T,
    token: Token,
    record: Box<dyn Record>,
}

impl Handover<Giving> {
    /// The source of `token`.
    pub fn giving(token: Token, record: Box<dyn Record>) -> Self {
        Self { state: Giving::Mine, token, record }
    }

    /// Writes down what `event` leads to, then makes it so. On an error nothing changed, except
    /// that what the destination said is so even if nobody could write it down.
    pub fn advance(&mut self, event: GivingEvent) -> io::Result<Giving> {
        let next = self.state.after(event);
        let written = self.change(next, Role::Source(next));
        if matches!(event, GivingEvent::Heard(_)) {
            self.state = next;
        }
        written
    }
}

impl Handover<Taking> {
    /// The destination of `token`.
    pub fn taking(token: Token, record: Box<dyn Record>) -> Self {
        Self { state: Taking::Empty, token, record }
    }

    /// Writes down what `event` leads to, then makes it so. On an error nothing changed, except
    /// that whoever shall be dead is so even if nobody could write it down: a process that ends
    /// does not run the guest either.
    pub fn advance(&mut self, event: TakingEvent) -> io::Result<Taking> {
        let next = self.state.after(event);
        let written = self.change(next, Role::Destination(next));
        if next == Taking::Dead {
            self.state = next;
        }
        written
    }
}

impl<T: Copy + PartialEq> Handover<T> {
    /// Where it is now.
    #[must_use]
    pub fn state(&self) -> T {
        self.state
    }

    /// Which migration this is.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    fn change(&mut self, next: T, role: Role) -> io::Result<T> {
        if next != self.state {
            self.record.write(self.token, role)?;
            self.state = next;
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// All that two sides and the network between them can be in.
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct World {
        source: Giving,
        destination: Taking,
        committed: bool,
        /// Messages under way; the network delivers them late, twice or never.
        commit: bool,
        query: bool,
        answers: Vec<bool>,
    }

    impl World {
        fn start() -> Self {
            let (source, destination) = (Giving::Mine, Taking::Empty);
            let (committed, commit, query, answers) = (false, false, false, vec![]);
            Self { source, destination, committed, commit, query, answers }
        }

        fn answered(mut self) -> Self {
            let running = self.destination.verdict() == Verdict::Running;
            if !self.answers.contains(&running) {
                self.answers.push(running);
            }
            self
        }

        /// Every world that can come next.
        fn next(&self) -> Vec<Self> {
            let take = |event| Self { destination: self.destination.after(event), ..self.clone() };
            let mut next = vec![take(TakingEvent::Loaded), take(TakingEvent::Lost)];
            if self.destination == Taking::Ready && !self.committed {
                let source = self.source.after(GivingEvent::Commit);
                next.push(Self { source, committed: true, commit: true, ..self.clone() });
            }
            if self.source == Giving::Asked {
                next.push(Self { query: true, ..self.clone() });
            }
            if self.commit {
                let world = take(TakingEvent::Commit);
                next.push(world.clone());
                if world.destination.may_run() {
                    next.push(world.answered());
                }
            }
            if self.query {
                next.push(take(TakingEvent::Queried).answered());
            }
            for &running in &self.answers {
                let verdict = if running { Verdict::Running } else { Verdict::Refused };
                let source = self.source.after(GivingEvent::Heard(verdict));
                next.push(Self { source, ..self.clone() });
            }
            next
        }
    }

    #[test]
    fn no_order_of_events_and_no_lost_message_makes_two_runners() {
        let mut seen = HashSet::new();
        let mut open = vec![World::start()];
        while let Some(world) = open.pop() {
            let (here, there) = (world.source.may_run(), world.destination.may_run());
            assert!(!(here && there), "{:?} and {:?}", world.source, world.destination);
            if seen.insert(world.clone()) {
                open.extend(world.next());
            }
        }
        let ended = |source, destination| {
            seen.iter().any(|world| (world.source, world.destination) == (source, destination))
        };
        assert!(ended(Giving::Given, Taking::Running), "a migration can succeed");
        assert!(ended(Giving::Back, Taking::Dead), "a guest can come back");
    }

    #[test]
    fn nobody_is_left_undecided_who_can_ask() {
        for destination in [Taking::Empty, Taking::Ready, Taking::Running, Taking::Dead] {
            let verdict = destination.after(TakingEvent::Queried).verdict();
            let source = Giving::Asked.after(GivingEvent::Heard(verdict));
            assert!(matches!(source, Giving::Given | Giving::Back));
        }
    }

    #[test]
    fn a_destination_that_knows_nothing_decides_nothing() {
        let asked = Giving::Asked.after(GivingEvent::Heard(Verdict::Unknown));
        assert_eq!(asked, Giving::Asked);
    }

    struct FullDisk;

    impl Record for FullDisk {
        fn write(&mut self, _: Token, _: Role) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }

    #[test]
    fn what_cannot_be_written_down_does_not_happen() {
        let token = Token::random().unwrap();
        let mut source = Handover::giving(token, Box::new(FullDisk));
        source.advance(GivingEvent::Commit).unwrap_err();
        assert_eq!(source.state(), Giving::Mine);
        let mut destination = Handover::taking(token, Box::new(FullDisk));
        destination.state = Taking::Ready;
        destination.advance(TakingEvent::Commit).unwrap_err();
        assert_eq!(destination.state(), Taking::Ready);
        destination.advance(TakingEvent::Lost).unwrap_err();
        assert_eq!(destination.state(), Taking::Dead);
    }

    #[test]
    fn a_token_is_read_as_it_is_printed() {
        let token = Token::random().unwrap();
        assert_eq!(token.to_string().parse(), Ok(token));
        assert_ne!(token, Token::random().unwrap());
        for wrong in ["", "12", &"+".repeat(32), &"g".repeat(32), &"é".repeat(16)] {
            assert!(wrong.parse::<Token>().is_err());
        }
    }
}
