//! When to stop copying and switch over: a pure function of what the passes so far showed.
//!
//! ```text
//! what is left fits into the downtime limit ─────────────► switch over: converged
//! the passes leave less and less, and are not too many ──► another pass
//! else, as the user wished:      stop ───────────────────► switch over: a longer stop
//!                                throttle ──► slow those down that write, another pass …
//!                                             … as slow as can be ──► as stop
//!                                fail ───────────────────► give up: the guest runs on here
//! ```
//!
//! `cargo run -p migration --example policy` shows it at work.

mod shares;

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use shares::Shares;

/// Bytes per second to expect of a connection that has not shown what it can do.
const ASSUMED_RATE: f64 = 100e6;
/// How many passes in a row may leave as much as ever, before more of them seem useless.
const HOPE: usize = 3;
/// The same while vCPUs are slowed down, which must show at once.
const SLOW_HOPE: usize = 1;
/// A pass that leaves less than this part of the least so far was worth it.
const WORTH: f64 = 0.9;
/// What part of itself a pass may leave for the passes to end soon.
const WANTED: f64 = 0.5;
/// By how much less vCPUs are made to write, in percent, one step after the other.
const STEPS: [u8; 7] = [20, 40, 60, 80, 90, 95, 99];

/// As many passes over memory as any policy makes.
pub const MOST_ROUNDS: u32 = 1000;

/// When to stop copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How long the guest may stand still for what is left then: memory, device and vCPU state.
    pub downtime_limit: Duration,
    /// How many passes over memory to make at most while it runs, and again after each step that
    /// takes long. More than [`MOST_ROUNDS`] count as that many.
    pub max_rounds: u32,
    /// What to do about a guest that writes faster than the connection carries.
    pub on_no_convergence: NoConvergence,
}

/// What to do about a guest that would never be copied within the downtime limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoConvergence {
    /// Slow its vCPUs down more and more, those first and most that write most, where that is
    /// known; if even that does not help, as `Stop`.
    Throttle,
    /// Stop it for longer than the limit.
    ///
    /// The default: of a guest that nobody gave leave to slow down, one stop is the least that it
    /// can be made to suffer, and it is moved, as was asked for.
    #[default]
    Stop,
    /// Give up: the guest runs on at the source.
    Fail,
}

impl NoConvergence {
    /// What [`FromStr`] understands.
    pub const NAMES: [&'static str; 3] = ["throttle", "stop", "fail"];
}

/// There is no such way to deal with a guest that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is one of throttle, stop and fail")]
pub struct NoSuchWay;

impl FromStr for NoConvergence {
    type Err = NoSuchWay;

    fn from_str(text: &str) -> Result<Self, NoSuchWay> {
        match text {
            "throttle" => Ok(Self::Throttle),
            "stop" => Ok(Self::Stop),
            "fail" => Ok(Self::Fail),
            _ => Err(NoSuchWay),
        }
    }
}

/// What a pass over memory showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Bytes of guest memory that it was about.
    pub pages: u64,
    /// Bytes of guest memory that were dirty after it.
    pub left: u64,
    /// How long it took.
    pub took: Duration,
    /// How many pages became dirty by each vCPU meanwhile; empty if that is not known.
    pub by_vcpu: Vec<u64>,
    /// For how much of that time vCPUs were kept from running.
    pub throttled: Shares,
}

impl Seen {
    /// Bytes per second of guest memory that became dirty meanwhile, each page counted once.
    #[must_use]
    pub fn dirtied(&self) -> f64 {
        self.left as f64 / self.took.as_secs_f64().max(1e-6)
    }
}

/// What to do after a pass over memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Make another pass.
    Continue,
    /// Keep vCPUs from running for so much of the time, some for more than before and none for
    /// less, and make another pass.
    Throttle(Shares),
    /// Stop the guest and send the rest.
    SwitchOver {
        /// Whether the downtime limit can be kept. If not, nothing better was to be had: the guest
        /// writes faster than the connection carries, and would do so for ever.
        converged: bool,
    },
    /// Leave the guest where it is.
    GiveUp,
}

/// How the copying of a running guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// So little was left that the downtime limit could be kept.
    Converged,
    /// The same, because vCPUs were slowed down.
    Throttled,
    /// The guest was stopped although more was left.
    Forced,
    /// The guest stayed.
    GaveUp,
}

impl Policy {
    /// Decides after each pass.
    ///
    /// `seen` holds what the passes so far showed; `rate` is what the connection carried in bytes
    /// per second, if known; `state` is the size in bytes of what else there is.
    #[must_use]
    pub fn decide(&self, seen: &[Seen], rate: Option<f64>, state: u64) -> Decision {
        if self.stop_for(seen, rate, state) <= self.downtime_limit {
            return Decision::SwitchOver { converged: true };
        }
        let many = seen.len() >= self.max_rounds.min(MOST_ROUNDS) as usize;
        if !many && !hopeless(seen) {
            return Decision::Continue;
        }
        match (self.on_no_convergence, seen.last().and_then(slower)) {
            (NoConvergence::Throttle, Some(shares)) if !many => Decision::Throttle(shares),
            (NoConvergence::Throttle | NoConvergence::Stop, _) => {
                Decision::SwitchOver { converged: false }
            }
            (NoConvergence::Fail, _) => Decision::GiveUp,
        }
    }

    /// How long the guest would stand still if it were stopped after the last of `seen`.
    #[must_use]
    pub fn stop_for(&self, seen: &[Seen], rate: Option<f64>, state: u64) -> Duration {
        let rate = rate.filter(|&rate| rate > 0.0).unwrap_or(ASSUMED_RATE);
        let rest = seen.last().map_or(0, |seen| seen.left).saturating_add(state);
        Duration::try_from_secs_f64(rest as f64 / rate).unwrap_or(Duration::MAX)
    }
}

/// Whether the last passes left no less than those before, all at the speed that vCPUs have now.
fn hopeless(seen: &[Seen]) -> bool {
    let Some(now) = seen.last().map(|seen| &seen.throttled) else { return false };
    let hope = if *now == Shares::NONE { HOPE } else { SLOW_HOPE };
    let Some(split) = seen.len().checked_sub(hope) else { return false };
    let (before, last) = seen.split_at(split);
    let least = |some: &[Seen]| some.iter().map(|seen| seen.left).min();
    match (least(before), least(last)) {
        (Some(before), Some(least)) => {
            last.iter().all(|seen| seen.throttled == *now) && least as f64 >= before as f64 * WORTH
        }
        _ => false,
    }
}

/// The first step for which a pass like `last` would have left little enough; the last if there is
/// none; none if vCPUs are as slow as can be.
fn slower(last: &Seen) -> Option<Shares> {
    let Seen { pages, left, by_vcpu, throttled, .. } = last;
    // What a pass leaves of itself is the rate of dirtying over that of sending.
    let leaves = *left as f64 / (*pages).max(1) as f64;
    let effect = throttled.effect(by_vcpu);
    let enough =
        |step: u8| leaves * (100.0 - f64::from(step)) / (100.0 - effect).max(1.0) <= WANTED;
    let steps = STEPS.into_iter().filter(|&step| f64::from(step) > effect);
    let slowed = steps.map(|step| (step, throttled.slowed(by_vcpu, step)));
    let mut slower = slowed.filter(|(_, shares)| shares != throttled);
    let (_, shares) =
        slower.clone().find(|&(step, _)| enough(step)).or_else(|| slower.next_back())?;
    Some(shares)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy {
        downtime_limit: Duration::from_millis(300),
        max_rounds: 30,
        on_no_convergence: NoConvergence::Stop,
    };
    const THROTTLE: Policy = Policy { on_no_convergence: NoConvergence::Throttle, ..POLICY };
    const FAIL: Policy = Policy { on_no_convergence: NoConvergence::Fail, ..POLICY };
    const MIB: u64 = 1 << 20;
    const FAST: Option<f64> = Some(100e6);

    /// Passes that left so many MiB, at full speed.
    fn passes(left: &[u64]) -> Vec<Seen> {
        let sent = [1024].iter().chain(left);
        let pass = |(&pages, &left): (&u64, &u64)| Seen {
            pages: pages * MIB,
            left: left * MIB,
            took: Duration::from_millis(10 * pages),
            by_vcpu: Vec::new(),
            throttled: Shares::NONE,
        };
        sent.zip(left).map(pass).collect()
    }

    fn throttled(percent: u8, mut seen: Vec<Seen>) -> Vec<Seen> {
        seen.last_mut().unwrap().throttled = Shares::Alike(percent);
        seen
    }

    #[test]
    fn little_left_means_switching_over() {
        let decision = POLICY.decide(&passes(&[900, 20]), FAST, MIB);
        assert_eq!(decision, Decision::SwitchOver { converged: true });
    }

    #[test]
    fn the_state_counts_as_downtime() {
        assert_eq!(POLICY.decide(&passes(&[900, 20]), FAST, 20 * MIB), Decision::Continue);
        let stop = POLICY.stop_for(&passes(&[900, 20]), Some(10.0 * MIB as f64), 30 * MIB);
        assert_eq!(stop, Duration::from_secs(5));
    }

    #[test]
    fn a_guest_that_never_converges_ends_as_was_wished() {
        let seen = passes(&[500, 400, 395, 399]);
        for policy in [POLICY, THROTTLE, FAIL] {
            assert_eq!(policy.decide(&seen, FAST, 0), Decision::Continue, "{policy:?}");
        }
        let seen = passes(&[500, 400, 395, 399, 390]);
        assert_eq!(POLICY.decide(&seen, FAST, 0), Decision::SwitchOver { converged: false });
        assert_eq!(FAIL.decide(&seen, FAST, 0), Decision::GiveUp);
        // Of 399 MiB it wrote 390 meanwhile: at half the speed that were about half.
        assert_eq!(THROTTLE.decide(&seen, FAST, 0), Decision::Throttle(Shares::Alike(60)));
    }

    #[test]
    fn a_slow_guest_is_slowed_down_more_as_soon_as_that_does_not_help() {
        let slow = throttled(60, passes(&[400, 400, 400, 400, 300]));
        assert_eq!(THROTTLE.decide(&slow, FAST, 0), Decision::Continue, "it helps");
        let slow = throttled(60, passes(&[400, 400, 400, 400, 390]));
        assert_eq!(THROTTLE.decide(&slow, FAST, 0), Decision::Throttle(Shares::Alike(80)));
        let slow = throttled(95, passes(&[400, 400, 400, 400, 40_000]));
        let last = Decision::Throttle(Shares::Alike(99));
        assert_eq!(THROTTLE.decide(&slow, FAST, 0), last, "the last there is");
        let slow = throttled(99, passes(&[400, 400, 400, 400, 390]));
        assert_eq!(THROTTLE.decide(&slow, FAST, 0), Decision::SwitchOver { converged: false });
    }

    /// The same passes, in which each vCPU wrote so many pages with such a share.
    fn written(by_vcpu: &[u64], shares: &[u8], mut seen: Vec<Seen>) -> Vec<Seen> {
        let last = seen.last_mut().unwrap();
        last.by_vcpu = by_vcpu.to_vec();
        if !shares.is_empty() {
            last.throttled = Shares::Each(shares.to_vec());
        }
        seen
    }

    #[test]
    fn who_writes_is_slowed_down_and_the_others_are_not() {
        const LEFT: [u64; 5] = [400, 400, 400, 400, 390];
        let decided = |by_vcpu: &[u64], shares: &[u8]| {
            THROTTLE.decide(&written(by_vcpu, shares, passes(&LEFT)), FAST, 0)
        };
        let each = |shares: &[u8]| Decision::Throttle(Shares::Each(shares.to_vec()));
        assert_eq!(decided(&[9000, 3, 0, 0], &[]), each(&[60, 0, 0, 0]));
        assert_eq!(decided(&[9000, 3, 0, 0], &[60, 0, 0, 0]), each(&[80, 0, 0, 0]));
        // Another begins.
        assert_eq!(decided(&[0, 3, 9000, 0], &[60, 0, 0, 0]), each(&[60, 0, 60, 0]));
        let stop = Decision::SwitchOver { converged: false };
        assert_eq!(decided(&[9000, 0], &[99, 0]), stop, "who writes is as slow as can be");
    }

    #[test]
    fn steady_progress_is_not_given_up() {
        let left: Vec<_> = (0..20).map(|round| 900 - 40 * round).collect();
        for count in 1..16 {
            for policy in [POLICY, THROTTLE, FAIL] {
                let decision = policy.decide(&passes(&left[..count]), FAST, 0);
                assert_eq!(decision, Decision::Continue, "{count}");
            }
        }
    }

    #[test]
    fn every_way_has_a_name() {
        let ways = NoConvergence::NAMES.map(|name| name.parse::<NoConvergence>().unwrap());
        assert_eq!(ways, [NoConvergence::Throttle, NoConvergence::Stop, NoConvergence::Fail]);
        assert_eq!("ask".parse::<NoConvergence>(), Err(NoSuchWay));
    }

    fn any_pass() -> impl Strategy<Value = Seen> {
        let shares = prop_oneof![
            (0..=99u8).prop_map(Shares::Alike),
            prop::collection::vec(0..=99u8, 4).prop_map(Shares::Each),
        ];
        let by_vcpu = prop_oneof![Just(Vec::new()), prop::collection::vec(any::<u64>(), 4)];
        let parts = (any::<[u64; 2]>(), any::<u32>(), by_vcpu, shares);
        parts.prop_map(|([pages, left], took, by_vcpu, throttled)| Seen {
            pages,
            left,
            took: Duration::from_micros(took.into()),
            by_vcpu,
            throttled,
        })
    }

    proptest! {
        #[test]
        fn every_migration_ends_in_bounded_time(
            seen in prop::collection::vec(any_pass(), 30..40),
            rate in prop::option::of(any::<f64>()),
            state: u64,
        ) {
            for policy in [POLICY, THROTTLE, FAIL] {
                let decision = policy.decide(&seen, rate, state);
                let ends = matches!(decision, Decision::SwitchOver { .. } | Decision::GiveUp);
                prop_assert!(ends, "{decision:?}");
            }
        }

        #[test]
        fn throttling_only_ever_grows(
            seen in prop::collection::vec(any_pass(), 0..29),
            rate in prop::option::of(any::<f64>()),
            state: u64,
        ) {
            if let Decision::Throttle(shares) = THROTTLE.decide(&seen, rate, state) {
                let before = &seen.last().unwrap().throttled;
                let grows = |vcpu| shares.of(vcpu) > before.of(vcpu);
                let falls = |vcpu| shares.of(vcpu) < before.of(vcpu);
                prop_assert!((0..4).any(grows) && !(0..4).any(falls) && shares.most() < 100);
            }
        }
    }
}
