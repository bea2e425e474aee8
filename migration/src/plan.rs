//! Who does what when a guest leaves: ordered steps that can be taken back.
//!
//! Pausing devices, flushing what they hold and rolling back are one mechanism. Whoever takes part
//! adds steps; entering a phase runs its steps by priority; a failure undoes those entered, in
//! reverse. A printed plan is the documentation of what will happen.

use std::error::Error;
use std::fmt;
use std::time::Instant;

/// The times at which steps run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Before the first page is sent. The guest runs on.
    Precopy,
    /// Little is left to send: the guest lets go of devices that must not go on to the end. It runs
    /// on, and what it writes meanwhile is sent after each step, until little is left again.
    Release,
    /// Little is left to send: from running to perfectly still.
    Quiesce,
}

/// When a step runs within its phase: lower first, equal ones in the order they were added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(pub u8);

impl Priority {
    /// The guest is asked to let go of devices, which takes it seconds; its vCPUs still run.
    pub const EVICT: Self = Self(5);
    /// The guest is asked to pause devices, which takes it milliseconds; its vCPUs still run.
    pub const GUEST: Self = Self(10);
    /// vCPUs stop, half-done exits are completed. Downtime starts here.
    pub const VCPUS: Self = Self(20);
    /// Assigned devices stop to start DMA to each other; all of them, before any stops.
    pub const ASSIGNED_P2P: Self = Self(30);
    /// Assigned devices stop.
    pub const ASSIGNED: Self = Self(40);
    /// Relays put what they hold into guest memory: shadow queues, vhost bases, inflight.
    pub const RELAYS: Self = Self(50);
    /// The kernel puts what it holds into guest memory: ITS tables on Arm.
    pub const IRQCHIP: Self = Self(60);
}

/// Why a step could not be entered.
pub type StepFailure = Box<dyn Error + Send + Sync>;

/// What a step does every now and then while it waits: the peer is told that this side is alive.
/// An error means that someone wishes to stop: the step ends with it.
pub type Meanwhile<'a> = dyn FnMut() -> Result<(), StepFailure> + 'a;

/// Something to do on the way out, and how to take it back.
pub trait Step: Send {
    /// What it does, for plans and errors: `stop 2 vCPUs`.
    fn name(&self) -> String;

    /// Does it. On an error it has left things as they were: `undo` is not called for it.
    ///
    /// The peer waits meanwhile: a step bounds its own waits, and calls `meanwhile` during those
    /// that can be longer than a second.
    fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure>;

    /// Whether the guest ran on for so long since `enter` began that what it wrote should be sent
    /// before it is stopped.
    fn took_long(&self) -> bool {
        false
    }

    /// Whether `enter` is to be called again once what the guest wrote has been sent.
    fn goes_on(&self) -> bool {
        false
    }

    /// Takes it back, in bounded time. Called only after `enter` succeeded, once, last entered
    /// first.
    fn undo(&mut self);
}

/// A step could not be entered.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct PlanError {
    /// The name of the step.
    pub step: String,
    source: StepFailure,
}

/// What [`Plan::enter_next`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// Nothing: all steps of the phase are entered.
    None,
    /// A step, and the guest can be stopped now.
    Quickly,
    /// A step that [took long](Step::took_long).
    Slowly,
}

struct Entry {
    phase: Phase,
    priority: Priority,
    step: Box<dyn Step>,
    entered: bool,
    /// Entered, and to be entered again.
    goes_on: bool,
}

impl Entry {
    fn is_due(&self, phase: Phase) -> bool {
        self.phase == phase && (!self.entered || self.goes_on)
    }
}

/// All steps of a machine.
#[derive(Default)]
pub struct Plan {
    /// Sorted by phase and priority.
    entries: Vec<Entry>,
    stopped: Option<Instant>,
}

impl Plan {
    /// A plan of no steps.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `step`. A device that has more to do adds more steps.
    pub fn at(&mut self, phase: Phase, priority: Priority, step: impl Step + 'static) {
        let place = self.entries.partition_point(|e| (e.phase, e.priority) <= (phase, priority));
        let entry = Entry { phase, priority, step: Box::new(step), entered: false, goes_on: false };
        self.entries.insert(place, entry);
    }

    /// Runs the steps of `phase` that are not entered yet, up to the first that fails.
    pub fn enter(&mut self, phase: Phase, meanwhile: &mut Meanwhile<'_>) -> Result<(), PlanError> {
        while self.enter_next(phase, meanwhile)? != Entered::None {}
        Ok(())
    }

    /// Runs the next step of `phase` that is not entered yet, if there is one.
    pub fn enter_next(
        &mut self,
        phase: Phase,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<Entered, PlanError> {
        let next = self.entries.iter_mut().find(|e| e.is_due(phase));
        let Some(entry) = next else { return Ok(Entered::None) };
        if (phase, entry.priority) >= (Phase::Quiesce, Priority::VCPUS) {
            self.stopped.get_or_insert_with(Instant::now);
        }
        let step = entry.step.name();
        tracing::debug!(step, "enter");
        entry.entered = false; // what fails has taken itself back
        entry.step.enter(meanwhile).map_err(|source| PlanError { step, source })?;
        (entry.entered, entry.goes_on) = (true, entry.step.goes_on());
        Ok(if entry.step.took_long() { Entered::Slowly } else { Entered::Quickly })
    }

    /// The name of the step that [`Plan::enter_next`] would run.
    #[must_use]
    pub fn next(&self, phase: Phase) -> Option<String> {
        let next = self.entries.iter().find(|e| e.is_due(phase));
        next.map(|entry| entry.step.name())
    }

    /// Takes back every entered step, last entered first. Then the plan can be entered again.
    pub fn undo(&mut self) {
        for entry in self.entries.iter_mut().rev().filter(|e| e.entered) {
            tracing::debug!(step = entry.step.name(), "undo");
            entry.step.undo();
            (entry.entered, entry.goes_on) = (false, false);
        }
        self.stopped = None;
    }

    /// When the vCPUs were told to stop; none while they run.
    #[must_use]
    pub fn stopped(&self) -> Option<Instant> {
        self.stopped
    }

    /// The names of the steps of `phase`, in order.
    pub fn names(&self, phase: Phase) -> impl Iterator<Item = String> + '_ {
        self.entries.iter().filter(move |e| e.phase == phase).map(|e| e.step.name())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let precopy = self.names(Phase::Precopy).chain(["copy memory while the guest runs".into()]);
        let last = [
            "collect the last dirty pages",
            "send them",
            "send the state",
            "check that nothing was written since",
            "hand over",
        ];
        let release = self.names(Phase::Release);
        let quiesce = self.names(Phase::Quiesce).chain(last.map(String::from));
        for (number, step) in precopy.chain(release).chain(quiesce).enumerate() {
            writeln!(f, "{:>3}. {step}", number + 1)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| e.step.name())).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    struct Logged(&'static str, Log);

    impl Step for Logged {
        fn name(&self) -> String {
            self.0.into()
        }
        fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
            meanwhile()?;
            if self.0 == "jam" {
                return Err("it is stuck".into());
            }
            self.1.lock().unwrap().push(format!("+{}", self.0));
            Ok(())
        }
        fn undo(&mut self) {
            self.1.lock().unwrap().push(format!("-{}", self.0));
        }
    }

    fn plan(steps: &[(Phase, Priority, &'static str)]) -> (Plan, Log) {
        let (mut plan, log) = (Plan::new(), Log::default());
        for &(phase, priority, name) in steps {
            plan.at(phase, priority, Logged(name, log.clone()));
        }
        (plan, log)
    }

    use Phase::{Precopy, Quiesce, Release};

    fn go_on() -> Result<(), StepFailure> {
        Ok(())
    }

    #[test]
    fn the_last_phase_runs_in_the_documented_order() {
        let (mut plan, log) = plan(&[
            (Quiesce, Priority::IRQCHIP, "irqchip"),
            (Quiesce, Priority::ASSIGNED, "stop"),
            (Quiesce, Priority::VCPUS, "vcpus"),
            (Precopy, Priority::ASSIGNED, "track"),
            (Quiesce, Priority::RELAYS, "relays"),
            (Quiesce, Priority::ASSIGNED_P2P, "p2p a"),
            (Release, Priority::GUEST, "pause"),
            (Release, Priority::EVICT, "evict"),
            (Quiesce, Priority::ASSIGNED_P2P, "p2p b"),
        ]);
        let order = ["vcpus", "p2p a", "p2p b", "stop", "relays", "irqchip"];
        assert!(plan.names(Quiesce).eq(order));
        assert!(plan.names(Release).eq(["evict", "pause"]));
        for phase in [Precopy, Release, Quiesce] {
            plan.enter(phase, &mut go_on).unwrap();
        }
        let entered: Vec<_> = log.lock().unwrap().iter().map(|line| line[1..].to_owned()).collect();
        assert_eq!(entered[..3], ["track", "evict", "pause"]);
        assert_eq!(entered[3..], order);
    }

    #[test]
    fn a_step_that_waits_hears_that_someone_wishes_to_stop() {
        let (mut plan, log) = plan(&[(Release, Priority::EVICT, "evict")]);
        let error = plan.enter(Release, &mut || Err("stop".into())).unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), "stop");
        assert!(log.lock().unwrap().is_empty());
        assert_eq!(plan.enter_next(Release, &mut go_on).unwrap(), Entered::Quickly);
        assert_eq!(plan.enter_next(Release, &mut go_on).unwrap(), Entered::None, "each once");
    }

    #[test]
    fn only_entered_steps_are_undone_in_reverse_and_once() {
        let (mut plan, log) = plan(&[
            (Precopy, Priority::ASSIGNED, "a"),
            (Quiesce, Priority::VCPUS, "b"),
            (Quiesce, Priority::ASSIGNED, "jam"),
            (Quiesce, Priority::RELAYS, "d"),
        ]);
        plan.enter(Precopy, &mut go_on).unwrap();
        let error = plan.enter(Quiesce, &mut go_on).unwrap_err();
        assert_eq!(error.to_string(), "cannot jam");
        assert_eq!(error.source().unwrap().to_string(), "it is stuck");
        plan.undo();
        plan.undo();
        assert_eq!(*log.lock().unwrap(), ["+a", "+b", "-b", "-a"]);
    }

    /// Goes on once, and then fails or not.
    struct Twice(u32, bool, Log);

    impl Step for Twice {
        fn name(&self) -> String {
            "twice".into()
        }
        fn enter(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
            self.0 += 1;
            if self.0 == 2 && self.1 { Err("it is stuck".into()) } else { Ok(()) }
        }
        fn took_long(&self) -> bool {
            self.goes_on()
        }
        fn goes_on(&self) -> bool {
            self.0 == 1
        }
        fn undo(&mut self) {
            self.2.lock().unwrap().push("-twice".into());
        }
    }

    #[test]
    fn a_step_that_goes_on_is_entered_again_and_undone_once() {
        for (fails, undone) in [(false, 1), (true, 0)] {
            let (mut plan, log) = plan(&[(Release, Priority::VCPUS, "later")]);
            plan.at(Release, Priority::GUEST, Twice(0, fails, log.clone()));
            assert_eq!(plan.next(Release).unwrap(), "twice");
            assert_eq!(plan.enter_next(Release, &mut go_on).unwrap(), Entered::Slowly);
            assert_eq!(plan.next(Release).unwrap(), "twice", "before what comes later");
            let again = plan.enter_next(Release, &mut go_on);
            assert_eq!(again.ok(), (!fails).then_some(Entered::Quickly));
            plan.undo();
            assert_eq!(log.lock().unwrap().len(), undone);
        }
    }

    #[test]
    fn downtime_starts_with_the_vcpus_and_ends_with_undo() {
        let (mut plan, _) =
            plan(&[(Precopy, Priority::VCPUS, "a"), (Quiesce, Priority::GUEST, "b")]);
        plan.enter(Precopy, &mut go_on).unwrap();
        plan.enter(Quiesce, &mut go_on).unwrap();
        assert_eq!(plan.stopped(), None);
        plan.at(Quiesce, Priority::VCPUS, Logged("stop", Log::default()));
        plan.enter(Quiesce, &mut go_on).unwrap();
        assert!(plan.stopped().is_some());
        plan.undo();
        assert_eq!(plan.stopped(), None);
    }

    #[test]
    fn a_printed_plan_tells_what_will_happen() {
        let (plan, _) = plan(&[(Quiesce, Priority::VCPUS, "stop 2 vCPUs")]);
        let printed = plan.to_string();
        assert!(printed.starts_with("  1. copy memory while the guest runs\n  2. stop 2 vCPUs\n"));
        assert!(printed.ends_with("  7. hand over\n"));
    }
}
