//! When to stop copying and switch over: a pure function of what is left.

use std::time::Duration;

/// Bytes per second to expect of a connection that has not shown what it can do.
const ASSUMED_RATE: f64 = 100e6;
/// How many passes in a row may leave as much as ever, before more of them seem useless.
const HOPE: usize = 3;
/// A pass that leaves less than this part of the least so far was worth it.
const WORTH: f64 = 0.9;

/// When to stop copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How long the guest may stand still for what is left then.
    pub downtime_limit: Duration,
    /// How many passes over memory to make at most while it runs.
    pub max_rounds: u32,
}

/// What to do after a pass over memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Make another pass.
    Continue,
    /// Stop the guest and send the rest.
    SwitchOver {
        /// Whether the downtime limit can be kept. If not, nothing better was to be had: the guest
        /// writes faster than the connection carries, and would do so for ever.
        converged: bool,
    },
}

impl Policy {
    /// Decides after each pass.
    ///
    /// `left` holds the bytes that were dirty after each pass so far; `rate` is what the connection
    /// carried in bytes per second, if known; `state` is the size in bytes of what else there is.
    #[must_use]
    pub fn decide(&self, left: &[u64], rate: Option<f64>, state: u64) -> Decision {
        let rate = rate.filter(|&rate| rate > 0.0).unwrap_or(ASSUMED_RATE);
        let rest = left.last().copied().unwrap_or(0).saturating_add(state);
        if rest as f64 / rate <= self.downtime_limit.as_secs_f64() {
            Decision::SwitchOver { converged: true }
        } else if left.len() >= self.max_rounds as usize || hopeless(left) {
            Decision::SwitchOver { converged: false }
        } else {
            Decision::Continue
        }
    }
}

/// Whether the last passes left no less than those before.
fn hopeless(left: &[u64]) -> bool {
    let Some(split) = left.len().checked_sub(HOPE) else { return false };
    let (before, last) = left.split_at(split);
    let least = |some: &[u64]| some.iter().min().map(|&least| least as f64);
    match (least(before), least(last)) {
        (Some(before), Some(last)) => last >= before * WORTH,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy { downtime_limit: Duration::from_millis(300), max_rounds: 30 };
    const MIB: u64 = 1 << 20;
    const FAST: Option<f64> = Some(100e6);

    #[test]
    fn little_left_means_switching_over() {
        let decision = POLICY.decide(&[900 * MIB, 20 * MIB], FAST, MIB);
        assert_eq!(decision, Decision::SwitchOver { converged: true });
    }

    #[test]
    fn the_state_counts_as_downtime() {
        assert_eq!(POLICY.decide(&[900 * MIB, 20 * MIB], FAST, 20 * MIB), Decision::Continue);
    }

    #[test]
    fn a_guest_that_never_converges_is_moved_anyway() {
        let left = [500 * MIB, 400 * MIB, 395 * MIB, 399 * MIB];
        assert_eq!(POLICY.decide(&left, FAST, 0), Decision::Continue);
        let left = [left.as_slice(), &[390 * MIB]].concat();
        assert_eq!(POLICY.decide(&left, FAST, 0), Decision::SwitchOver { converged: false });
    }

    #[test]
    fn steady_progress_is_not_given_up() {
        let left: Vec<_> = (0..20).map(|round| (900 - 40 * round) * MIB).collect();
        for passes in 1..16 {
            assert_eq!(POLICY.decide(&left[..passes], FAST, 0), Decision::Continue, "{passes}");
        }
    }

    proptest! {
        #[test]
        fn every_guest_is_moved_in_bounded_time(
            left in prop::collection::vec(any::<u64>(), 30..40),
            rate in prop::option::of(any::<f64>()),
            state: u64,
        ) {
            prop_assert_ne!(POLICY.decide(&left, rate, state), Decision::Continue);
        }
    }
}
