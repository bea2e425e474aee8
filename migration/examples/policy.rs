//! What the policy decides for guests whose writing was recorded: `cargo run -p migration
//! --example policy`.
//!
//! A trace tells how much of its memory a guest had written some time after the log was empty. From
//! that follows what each pass leaves, at any speed of the connection and however slow vCPUs are
//! made.

use std::io::{self, Write};
use std::time::Duration;

use migration::policy::{Decision, NoConvergence, Outcome, Policy, Seen, Shares};

const TRACES: [(&str, &str); 4] = [
    ("still", include_str!("traces/still.txt")),
    ("one-mib", include_str!("traces/one-mib.txt")),
    ("set-of-64-mib", include_str!("traces/set-of-64-mib.txt")),
    ("most-of-memory", include_str!("traces/most-of-memory.txt")),
];
/// Which part of all that is written each vCPU writes; nothing where that is not known.
type Writers = &'static [f64];

const UNKNOWN: Writers = &[];
const ONE_OF_FOUR: Writers = &[0.0, 0.0, 1.0, 0.0];
const MOST_BY_ONE: Writers = &[0.1, 0.0, 0.7, 0.2];
/// Bytes of device and vCPU state.
const STATE: u64 = 32 << 10;
/// More decisions than any policy here takes.
const MANY: usize = 1000;
const PAGE: u64 = 4096;

/// How a guest writes.
struct Trace {
    memory: u64,
    /// Bytes per second that the connection can carry.
    rate: f64,
    /// Seconds, and the bytes written by then; both grow.
    written: Vec<(f64, f64)>,
}

impl Trace {
    /// Comments, `memory BYTES`, `rate BYTES`, and then lines of microseconds and bytes.
    fn parse(text: &str) -> Option<Self> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let mut trace = Self { memory: 0, rate: 0.0, written: vec![(0.0, 0.0)] };
        let mut most: f64 = 0.0;
        for line in lines {
            match line.split_once(' ')? {
                ("memory", bytes) => trace.memory = bytes.parse().ok()?,
                ("rate", bytes) => trace.rate = bytes.parse().ok()?,
                (microseconds, bytes) => {
                    let seconds = microseconds.parse::<f64>().ok()? / 1e6;
                    // Recorded at different times: a guest that wrote less later is not slower.
                    most = most.max(bytes.parse().ok()?);
                    trace.written.push((seconds, most));
                }
            }
        }
        let sorted = trace.written.is_sorted_by(|a, b| a.0 < b.0);
        (trace.memory > 0 && trace.rate > 0.0 && sorted).then_some(trace)
    }

    /// Bytes that the guest has written after it ran for `seconds`.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of memory are no fraction and not negative"
    )]
    fn after(&self, seconds: f64) -> u64 {
        let next = self.written.partition_point(|&(at, _)| at < seconds);
        let bytes = match (self.written.get(next.wrapping_sub(1)), self.written.get(next)) {
            (Some(&(from, before)), Some(&(to, then))) => {
                before + (then - before) * (seconds - from) / (to - from)
            }
            (last, None) => last.map_or(0.0, |&(_, bytes)| bytes),
            (None, Some(&(_, first))) => first,
        };
        bytes as u64
    }
}

/// One migration of the guest of `trace`, written by `writers`, whose memory flows at `speed` bytes
/// per second: each pass, what was decided after it, and for how long the guest would stand still
/// then.
fn simulate(
    trace: &Trace,
    writers: Writers,
    policy: &Policy,
    speed: f64,
) -> Vec<(Seen, Decision, Duration)> {
    let (mut seen, mut told) = (Vec::new(), Vec::new());
    let (mut pages, mut throttled) = (trace.memory, Shares::NONE);
    while told.len() < MANY {
        let took = pages as f64 / speed.min(trace.rate);
        let by = |vcpu| trace.after(took * (1.0 - f64::from(throttled.of(vcpu)) / 100.0));
        let by_vcpu: Vec<_> =
            writers.iter().enumerate().map(|(vcpu, part)| part_of(by(vcpu), *part)).collect();
        let left = if writers.is_empty() { by(0) } else { by_vcpu.iter().sum() };
        let by_vcpu = by_vcpu.iter().map(|bytes| bytes / PAGE).collect();
        let took = Duration::from_secs_f64(took);
        seen.push(Seen { pages, left, took, by_vcpu, throttled: throttled.clone() });
        let decision = policy.decide(&seen, Some(trace.rate), STATE);
        told.push((
            seen[seen.len() - 1].clone(),
            decision.clone(),
            policy.stop_for(&seen, Some(trace.rate), STATE),
        ));
        pages = left;
        match decision {
            Decision::Continue => {}
            Decision::Throttle(shares) => throttled = shares,
            Decision::SwitchOver { .. } | Decision::GiveUp => break,
        }
    }
    told
}

/// `part` of so many bytes.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of memory is no larger, and a fraction of a byte is none"
)]
fn part_of(bytes: u64, part: f64) -> u64 {
    (bytes as f64 * part) as u64
}

/// How it ended.
fn outcome(told: &[(Seen, Decision, Duration)]) -> Option<Outcome> {
    match told.last()? {
        (seen, Decision::SwitchOver { converged: true }, _) if seen.throttled != Shares::NONE => {
            Some(Outcome::Throttled)
        }
        (_, Decision::SwitchOver { converged: true }, _) => Some(Outcome::Converged),
        (_, Decision::SwitchOver { converged: false }, _) => Some(Outcome::Forced),
        (_, Decision::GiveUp, _) => Some(Outcome::GaveUp),
        (_, Decision::Continue | Decision::Throttle(_), _) => None,
    }
}

fn policy(limit_ms: u64, on_no_convergence: NoConvergence) -> Policy {
    let downtime_limit = Duration::from_millis(limit_ms);
    Policy { downtime_limit, max_rounds: 30, on_no_convergence }
}

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (name, text) in TRACES {
        let trace = Trace::parse(text).ok_or(io::ErrorKind::InvalidData)?;
        for (limit_ms, speed) in [(300, f64::INFINITY), (10, 100e6)] {
            let speed_told = speed.min(trace.rate) / 1e6;
            for (wish, writers) in [
                (NoConvergence::Throttle, UNKNOWN),
                (NoConvergence::Throttle, ONE_OF_FOUR),
                (NoConvergence::Throttle, MOST_BY_ONE),
                (NoConvergence::Stop, UNKNOWN),
                (NoConvergence::Fail, UNKNOWN),
            ] {
                write!(out, "\n{name}, {limit_ms} ms, {speed_told:.0} MB/s, {wish:?}")?;
                writeln!(out, ", written by {writers:?}")?;
                tell(&mut out, &simulate(&trace, writers, &policy(limit_ms, wish), speed))?;
            }
        }
    }
    Ok(())
}

fn tell(out: &mut impl Write, told: &[(Seen, Decision, Duration)]) -> io::Result<()> {
    for (pass, (Seen { pages, left, took, throttled, .. }, decision, stop)) in
        told.iter().enumerate()
    {
        let (pages, left) = (*pages as f64 / 1e6, *left as f64 / 1e6);
        writeln!(
            out,
            "{:>3}: {pages:>7.2} MB in {took:>9.2?} at {:>3} % left {left:>6.2} MB: \
             {decision:?}, stop {stop:.2?}",
            pass + 1,
            100 - throttled.most(),
        )?;
    }
    writeln!(out, "     {:?}", outcome(told))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISHES: [NoConvergence; 3] =
        [NoConvergence::Throttle, NoConvergence::Stop, NoConvergence::Fail];

    fn end(
        name: &str,
        limit_ms: u64,
        wish: NoConvergence,
        speed: f64,
    ) -> (Outcome, usize, Duration) {
        let text = TRACES.iter().find(|trace| trace.0 == name).unwrap().1;
        let trace = Trace::parse(text).unwrap();
        let told = simulate(&trace, UNKNOWN, &policy(limit_ms, wish), speed);
        (outcome(&told).unwrap(), told.len(), told[told.len() - 1].2)
    }

    #[test]
    fn while_one_of_four_vcpus_writes_the_others_are_not_slowed_down() {
        for name in ["set-of-64-mib", "most-of-memory"] {
            let text = TRACES.iter().find(|trace| trace.0 == name).unwrap().1;
            let trace = Trace::parse(text).unwrap();
            let policy = policy(5, NoConvergence::Throttle);
            let alike = simulate(&trace, UNKNOWN, &policy, 2e7);
            let one = simulate(&trace, ONE_OF_FOUR, &policy, 2e7);
            assert_eq!(outcome(&one), Some(Outcome::Throttled), "{name}");
            assert_eq!(one.len(), alike.len(), "{name}: it takes no more passes than with all");
            let (last, ..) = one.last().unwrap();
            let shares: Vec<_> = (0..4).map(|vcpu| last.throttled.of(vcpu)).collect();
            assert_eq!(shares, [0, 0, alike.last().unwrap().0.throttled.most(), 0], "{name}");
        }
    }

    #[test]
    fn the_more_a_vcpu_writes_the_more_it_is_slowed_down() {
        let trace = Trace::parse(TRACES[3].1).unwrap();
        let policy = policy(5, NoConvergence::Throttle);
        let told = simulate(&trace, MOST_BY_ONE, &policy, 2e7);
        assert_eq!(outcome(&told), Some(Outcome::Throttled));
        let first = told.iter().find(|(seen, ..)| seen.throttled != Shares::NONE).unwrap();
        let of = |vcpu| first.0.throttled.of(vcpu);
        assert!(of(1) == 0 && of(0) <= of(3) && of(3) < of(2), "{:?}", first.0.throttled);
    }

    #[test]
    fn every_recorded_guest_ends_within_thirty_passes_at_any_speed() {
        for (name, _) in TRACES {
            for limit_ms in [0, 1, 30, 300] {
                for speed in [1e5, 1e6, 1e7, 1e8, 1e9, f64::INFINITY] {
                    for wish in WISHES {
                        let (_, passes, _) = end(name, limit_ms, wish, speed);
                        assert!(passes <= 30, "{name} {limit_ms} {speed} {wish:?}: {passes}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_calm_guest_is_neither_slowed_down_nor_kept() {
        for name in ["still", "one-mib"] {
            for wish in WISHES {
                let (outcome, passes, _) = end(name, 300, wish, f64::INFINITY);
                assert_eq!((outcome, passes), (Outcome::Converged, 1), "{name}");
            }
        }
    }

    #[test]
    fn a_guest_with_a_working_set_ends_as_was_wished() {
        for name in ["set-of-64-mib", "most-of-memory"] {
            let limit = Duration::from_millis(5);
            let (outcome, _, stop) = end(name, 5, NoConvergence::Throttle, 2e7);
            assert_eq!(outcome, Outcome::Throttled, "{name}");
            assert!(stop <= limit, "{name}: {stop:?}");
            let (outcome, _, stop) = end(name, 5, NoConvergence::Stop, 2e7);
            assert_eq!(outcome, Outcome::Forced, "{name}");
            assert!(stop > limit, "{name}: {stop:?}");
            let (outcome, ..) = end(name, 5, NoConvergence::Fail, 2e7);
            assert_eq!(outcome, Outcome::GaveUp, "{name}");
        }
    }
}
