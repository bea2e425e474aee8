//! All that two sides and the network between them can be in, and what can come next.

use super::letters::{Letter, Letters};
use super::paper::{DISKS, Disk, with};
use super::{ATTEMPTS, Flaw};
use crate::handover::{Giving, GivingEvent, Handover, Taking, TakingEvent, Verdict};
use crate::record::{NoRecord, Role, may_boot};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct World {
    source: Source,
    /// Which attempt is the last so far.
    latest: usize,
    /// One for each attempt; none where no process is, or one that knows nothing.
    pub(super) destinations: [Option<There>; ATTEMPTS],
    crashed: [bool; ATTEMPTS],
    /// On paper, at the source and at each destination.
    given: [Option<Role>; ATTEMPTS],
    taken: [Option<Role>; ATTEMPTS],
    /// Where the guest ran, if only until a crash.
    ran: [bool; ATTEMPTS],
    came_back: bool,
    said: Letters,
}

/// The source's process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// Has the guest in memory, and tries to give it away for the nth time.
    Here { attempt: usize, state: Giving },
    /// Has crashed, or ended without knowing.
    Down,
    /// A process without a guest that asks about an attempt.
    Asking { attempt: usize, state: Giving },
    /// Has ended as one that gave its guest away.
    Gone,
}

impl Default for Source {
    fn default() -> Self {
        Self::Here { attempt: 0, state: Giving::Mine }
    }
}

/// A destination's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct There {
    pub(super) state: Taking,
    promised: bool,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// The source gives this attempt up while the guest is its own, and begins the next.
    TryAgain,
    /// The source gives the guest away.
    Commit(Disk),
    /// The source, which does not know, asks.
    Ask,
    /// The source takes the guest back without being told so: only where that rule is broken.
    TakeBack,
    SourceCrashes,
    SourceRestarts,
    /// All has arrived at a destination.
    Load(usize, Disk),
    /// A destination waits for COMMIT no longer.
    Lose(usize, Disk),
    Crash(usize),
    Restart(usize),
    /// Whoever it is for gets this. If not `well`, a guest that was to start cannot, and a query
    /// is answered by someone else who got that address.
    Deliver(Letter, Disk, bool),
}

impl World {
    /// At how many places the guest runs, or ran last.
    pub(super) fn runners(&self) -> usize {
        let here = match self.source {
            Source::Here { state, .. } => state.may_run(),
            Source::Down | Source::Asking { .. } | Source::Gone => false,
        };
        usize::from(here) + self.ran.iter().filter(|ran| **ran).count()
    }

    pub(super) fn was_committed(&self) -> bool {
        (0..ATTEMPTS).all(|at| !self.ran[at] || self.said.has(Letter::Commit(at)))
    }

    pub(super) fn ran(&self, attempt: usize) -> bool {
        self.ran[attempt]
    }

    pub(super) fn came_back(&self) -> bool {
        self.came_back
    }

    pub(super) fn is_forgotten(&self) -> bool {
        let papers = self.given.iter().chain(&self.taken);
        self.source == Source::Gone && papers.flatten().count() == 0
    }

    /// All that can come next.
    pub(super) fn acts(&self, attempts: usize, flaw: Option<Flaw>, acts: &mut Vec<Act>) {
        match self.source {
            Source::Here { attempt, state } => {
                if state.may_run() && attempt < attempts {
                    acts.push(Act::TryAgain);
                }
                match state {
                    Giving::Awaited => acts.extend(DISKS.map(Act::Commit)),
                    Giving::Asked => acts.push(Act::Ask),
                    _ => {}
                }
                if state == Giving::Asked && flaw == Some(Flaw::ResumesAlone) {
                    acts.push(Act::TakeBack);
                }
                acts.push(Act::SourceCrashes);
            }
            Source::Asking { .. } => acts.extend([Act::Ask, Act::SourceCrashes]),
            Source::Down => acts.push(Act::SourceRestarts),
            Source::Gone => {}
        }
        for number in 0..ATTEMPTS {
            if let Some(there) = self.destinations[number] {
                acts.push(Act::Crash(number));
                if matches!(there.state, Taking::Empty | Taking::Ready) {
                    acts.extend(DISKS.map(|disk| Act::Lose(number, disk)));
                }
            } else if self.crashed[number] {
                acts.push(Act::Restart(number));
            } else if number < attempts
                && matches!(self.source, Source::Here { attempt, .. } if attempt == number)
            {
                acts.extend(DISKS.map(|disk| Act::Load(number, disk)));
            }
        }
        for letter in Letters::all().filter(|letter| self.said.has(*letter)) {
            for disk in DISKS {
                acts.push(Act::Deliver(letter, disk, true));
                if matches!(letter, Letter::Commit(_) | Letter::Query(_)) {
                    acts.push(Act::Deliver(letter, disk, false));
                }
            }
        }
    }

    pub(super) fn after(&self, act: Act, flaw: Option<Flaw>) -> Self {
        let mut next = self.clone();
        match act {
            Act::TryAgain => next.try_again(),
            Act::Commit(disk) => next.commit(disk, flaw),
            Act::Ask => next.ask(),
            Act::TakeBack => next.take_back(),
            Act::SourceCrashes => next.source = Source::Down,
            Act::SourceRestarts => next.source_restarts(flaw),
            Act::Load(number, disk) => next.load(number, disk, flaw),
            Act::Lose(number, disk) => next.lose(number, disk, flaw),
            Act::Crash(number) => next.crash(number),
            Act::Restart(number) => next.restart(number),
            Act::Deliver(letter, disk, well) => next.deliver(letter, (disk, flaw), well),
        }
        next
    }

    fn try_again(&mut self) {
        self.latest += 1;
        self.source = Source::Here { attempt: self.latest, state: Giving::Mine };
    }

    fn take_back(&mut self) {
        if let Source::Here { state, .. } = &mut self.source {
            *state = Giving::Back;
        }
    }

    fn ask(&mut self) {
        if let Source::Here { attempt, .. } | Source::Asking { attempt, .. } = self.source {
            self.said.say(Letter::Query(attempt));
        }
    }

    /// COMMIT leaves where it is written down that it may have left.
    fn commit(&mut self, disk: Disk, flaw: Option<Flaw>) {
        let Source::Here { attempt, state } = &mut self.source else { return };
        let paper = &mut self.given[*attempt];
        let advance = |half: &mut Handover<Giving>| half.advance(GivingEvent::Commit);
        let given = with((state, &mut false), paper, (disk, flaw), advance);
        if given.is_ok_and(|state| state == Giving::Asked) {
            self.said.say(Letter::Commit(*attempt));
        }
    }

    /// Boots the guest again, or asks about the first attempt that stands in the way.
    fn source_restarts(&mut self, flaw: Option<Flaw>) {
        let papers = self.given.iter().flatten().copied();
        if may_boot(papers) || flaw == Some(Flaw::BootsUnasked) {
            self.latest = ATTEMPTS.min(self.latest + 1);
            let attempt = self.latest;
            self.source = Source::Here { attempt, state: Giving::Mine };
        } else if self.given.contains(&Some(Role::Source(Giving::Given))) {
            self.source = Source::Gone;
        } else {
            let asked = |paper: &Option<Role>| *paper == Some(Role::Source(Giving::Asked));
            let attempt = self.given.iter().position(asked).unwrap();
            self.source = Source::Asking { attempt, state: Giving::Asked };
        }
    }

    fn source_hears(&mut self, about: usize, event: GivingEvent, how: (Disk, Option<Flaw>)) {
        let (attempt, state, asking) = match &mut self.source {
            Source::Here { attempt, state } => (*attempt, state, false),
            Source::Asking { attempt, state } => (*attempt, state, true),
            Source::Down | Source::Gone => return,
        };
        if attempt != about {
            return;
        }
        let before = *state;
        let paper = &mut self.given[attempt];
        let heard = with((state, &mut false), paper, how, |half| half.advance(event));
        let settled = state.is_settled() && !before.is_settled();
        let state = *state;
        if settled && (heard.is_ok() || how.1 == Some(Flaw::DoneIsNotWritten)) {
            self.said.say(Letter::Done(attempt));
        }
        if settled {
            self.source_settles(attempt, state, heard.is_ok(), asking);
        }
    }

    fn source_settles(&mut self, attempt: usize, state: Giving, written: bool, asking: bool) {
        self.came_back |= state == Giving::Back;
        let paper = &mut self.given[attempt];
        match state {
            Giving::Given if written => {
                with((&mut { state }, &mut false), paper, (Disk::Writes, None), Handover::settle);
                self.source = Source::Gone;
            }
            Giving::Given => self.source = Source::Down,
            _ => {
                if written {
                    let settle = Handover::<Giving>::settle;
                    with((&mut { state }, &mut false), paper, (Disk::Writes, None), settle);
                }
                if asking {
                    self.source = Source::Down;
                }
            }
        }
    }

    fn load(&mut self, number: usize, disk: Disk, flaw: Option<Flaw>) {
        let mut there = There { state: Taking::Empty, promised: false };
        let loaded =
            self.there(number, &mut there, (disk, flaw), |half| half.advance(TakingEvent::Loaded));
        if loaded.is_ok() {
            self.destinations[number] = Some(there);
            self.said.say(Letter::Ready(number));
        } else {
            self.crashed[number] = true; // it ends with an error
        }
    }

    fn there<R>(
        &mut self,
        number: usize,
        there: &mut There,
        how: (Disk, Option<Flaw>),
        act: impl FnOnce(&mut Handover<Taking>) -> R,
    ) -> R {
        with((&mut there.state, &mut there.promised), &mut self.taken[number], how, act)
    }

    fn lose(&mut self, number: usize, disk: Disk, flaw: Option<Flaw>) {
        let Some(mut there) = self.destinations[number] else { return };
        if flaw == Some(Flaw::RunsUncommitted) && there.state == Taking::Ready {
            self.ran[number] = true;
            return;
        }
        let verdict = self.there(number, &mut there, (disk, flaw), |half| {
            let _unwritten = half.advance(TakingEvent::Lost);
            half.asked()
        });
        self.destinations[number] = Some(there);
        self.said.say(Letter::Answer(number, verdict));
    }

    /// A guest that may have run in what crashed, as far as anyone can know, did.
    fn crash(&mut self, number: usize) {
        self.ran[number] |= self.taken[number] == Some(Role::Destination(Taking::Running));
        self.destinations[number] = None;
        self.crashed[number] = true;
    }

    /// A later process in the place of one that ended; it is there only to be asked.
    fn restart(&mut self, number: usize) {
        let Some(Role::Destination(state)) = self.taken[number] else { return };
        let record = Box::new(NoRecord);
        let token = "00112233445566778899aabbccddeeff".parse().unwrap();
        let state = Handover::took(token, state, record).state();
        self.destinations[number] = Some(There { state, promised: false });
    }

    fn deliver(&mut self, letter: Letter, how: (Disk, Option<Flaw>), well: bool) {
        match letter {
            Letter::Ready(about) => self.source_hears(about, GivingEvent::Ready, how),
            Letter::Running(about) => {
                self.source_hears(about, GivingEvent::Heard(Verdict::Running), how);
            }
            Letter::Answer(about, verdict) => {
                let verdict = Self::heard(verdict, how.1);
                self.source_hears(about, GivingEvent::Heard(verdict), how);
            }
            Letter::Commit(number) => self.committed(number, how, well),
            Letter::Query(number) if well => self.queried(number, how),
            Letter::Query(number) => self.said.say(Letter::Answer(number, Verdict::Unknown)),
            Letter::Done(number) => {
                let Some(mut there) = self.destinations[number] else { return };
                self.there(number, &mut there, how, Handover::done);
            }
        }
    }

    fn committed(&mut self, number: usize, how: (Disk, Option<Flaw>), starts: bool) {
        let Some(mut there) = self.destinations[number] else { return };
        if there.state == Taking::Running {
            return; // it does not listen to its source any more
        }
        let (runs, verdict) = self.there(number, &mut there, how, |half| {
            let advanced = half.advance(TakingEvent::Commit);
            let runs = advanced.is_ok_and(Taking::may_run);
            if runs && starts {
                return (true, Verdict::Running);
            }
            let event = if runs { TakingEvent::CouldNotStart } else { TakingEvent::Lost };
            let _unwritten = half.advance(event);
            (false, half.asked())
        });
        self.ran[number] |= runs;
        let answer = Letter::Answer(number, verdict);
        let said = if runs { Letter::Running(number) } else { answer };
        self.destinations[number] = Some(there);
        let misspoken = self.misspoken(number, how.1);
        self.said.say(misspoken.unwrap_or(said));
        self.forgets_unheard(number, how.1);
    }

    fn queried(&mut self, number: usize, how: (Disk, Option<Flaw>)) {
        let Some(mut there) = self.destinations[number] else {
            if !self.crashed[number] || self.taken[number].is_none() {
                self.said.say(Letter::Answer(number, Verdict::Unknown));
            }
            return;
        };
        if let Some(said) = self.misspoken(number, how.1) {
            return self.said.say(said);
        }
        let verdict = self.there(number, &mut there, how, Handover::asked);
        self.destinations[number] = Some(there);
        self.said.say(Letter::Answer(number, verdict));
        self.forgets_unheard(number, how.1);
    }

    fn forgets_unheard(&mut self, number: usize, flaw: Option<Flaw>) {
        if flaw == Some(Flaw::ForgetsUnheard) {
            self.taken[number] = None;
        }
    }

    /// What becomes of it if from now on nothing goes wrong: all run, all disks write, whoever does
    /// not know asks and is heard.
    pub(super) fn healed(&self, flaw: Option<Flaw>) -> Self {
        let mut world = self.clone();
        for _ in 0..4 * ATTEMPTS {
            let attempt = match world.source {
                Source::Here { attempt, state: Giving::Asked } => attempt,
                Source::Asking { attempt, .. } => attempt,
                Source::Down => {
                    world = world.after(Act::SourceRestarts, flaw);
                    continue;
                }
                Source::Here { .. } | Source::Gone => break,
            };
            if world.destinations[attempt].is_none() {
                world = world.after(Act::Restart(attempt), flaw);
            }
            let before = world.said;
            world.said = Letters::default();
            world = world.after(Act::Deliver(Letter::Query(attempt), Disk::Writes, true), flaw);
            let answers = world.said;
            for letter in Letters::all().filter(|letter| answers.has(*letter)) {
                world = world.after(Act::Deliver(letter, Disk::Writes, true), flaw);
            }
            world.said = before;
        }
        world
    }
}
