//! Which packing carries the most memory here and now.
//!
//! A wire, two processors and what the memory holds decide that together, and none of them is known
//! beforehand. So a connection tries each way for a moment, keeps to the fastest for long, and tries
//! again: all of them change.

use std::time::{Duration, Instant};

use super::Codec;

/// Chooses one of several ways to pack, for one connection.
pub(super) struct Choice {
    ways: &'static [Option<Codec>],
    phase: Phase,
    /// Of this phase: bytes of memory as it was before it was packed, and how long they took.
    bytes: u64,
    took: Duration,
    /// Bytes per second of each way when it was last tried.
    speeds: [f64; ALL.len()],
    /// What was begun last, and when.
    under_way: Option<(u64, Instant)>,
}

/// Numbers are places in the list of ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The first way, until what lies between the ends of the connection is full: that looks fast.
    Filling,
    Trying(usize),
    Keeping(usize),
}

const ALL: [Option<Codec>; 3] = [None, Some(Codec::Lz4), Some(Codec::Zstd)];

impl Phase {
    fn way(self) -> usize {
        match self {
            Self::Filling => 0,
            Self::Trying(way) | Self::Keeping(way) => way,
        }
    }

    /// It ends after so many bytes, or this long.
    fn limits(self) -> (u64, Duration) {
        match self {
            Self::Filling => (8 << 20, Duration::from_secs(1)),
            Self::Trying(_) => (2 << 20, Duration::from_millis(200)),
            Self::Keeping(_) => (u64::MAX, Duration::from_secs(5)),
        }
    }
}

impl Choice {
    /// Always the same.
    pub(super) fn fixed(codec: Option<Codec>) -> Self {
        Self::among(match codec {
            None => &[None],
            Some(Codec::Lz4) => &[Some(Codec::Lz4)],
            Some(Codec::Zstd) => &[Some(Codec::Zstd)],
        })
    }

    /// Whichever turns out to be the fastest.
    pub(super) fn fastest() -> Self {
        Self::among(&ALL)
    }

    fn among(ways: &'static [Option<Codec>]) -> Self {
        Self {
            ways,
            phase: Phase::Filling,
            bytes: 0,
            took: Duration::ZERO,
            speeds: [0.0; ALL.len()],
            under_way: None,
        }
    }

    /// How to pack `len` bytes that are sent from `now` on, until this is called again.
    pub(super) fn next(&mut self, len: u64, now: Instant) -> Option<Codec> {
        if let Some((before, since)) = self.under_way.replace((len, now)) {
            self.account(before, now.saturating_duration_since(since));
        }
        self.ways[self.phase.way()]
    }

    /// What was begun is over: time that passes from here on says nothing.
    pub(super) fn rest(&mut self) {
        self.under_way = None;
    }

    fn account(&mut self, bytes: u64, took: Duration) {
        (self.bytes, self.took) = (self.bytes + bytes, self.took + took);
        let (most, longest) = self.phase.limits();
        if self.ways.len() == 1 || (self.bytes < most && self.took < longest) {
            return;
        }
        let speed = self.bytes as f64 / self.took.as_secs_f64().max(1e-9);
        (self.bytes, self.took) = (0, Duration::ZERO);
        self.phase = match self.phase {
            Phase::Filling | Phase::Keeping(_) => Phase::Trying(0),
            Phase::Trying(way) => {
                self.speeds[way] = speed;
                if way + 1 < self.ways.len() { Phase::Trying(way + 1) } else { self.best() }
            }
        };
    }

    fn best(&self) -> Phase {
        let speed = |way: &usize| self.speeds[*way];
        let best = (0..self.ways.len()).max_by(|a, b| speed(a).total_cmp(&speed(b)));
        let best = best.expect("there is at least one way");
        tracing::debug!(way = ?self.ways[best], speeds = ?self.speeds, "chose how to pack");
        Phase::Keeping(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: u64 = 256 << 10;

    /// Sends `frames`, at these bytes per second for each way; gives how many went by each.
    fn send(choice: &mut Choice, now: &mut Instant, speeds: [f64; 3], frames: usize) -> [usize; 3] {
        let mut by = [0; 3];
        for _ in 0..frames {
            let codec = choice.next(FRAME, *now);
            let way = ALL.iter().position(|other| *other == codec).unwrap();
            by[way] += 1;
            *now += Duration::from_secs_f64(FRAME as f64 / speeds[way]);
        }
        by
    }

    #[test]
    fn the_fastest_carries_nearly_everything_and_is_looked_for_again() {
        let (mut choice, mut now) = (Choice::fastest(), Instant::now());
        let slow_wire = [100e6, 250e6, 400e6];
        let by = send(&mut choice, &mut now, slow_wire, 20_000);
        assert!(by[2] > 19_000, "{by:?}");
        let fast_wire = [4000e6, 700e6, 300e6];
        send(&mut choice, &mut now, fast_wire, 10_000);
        let by = send(&mut choice, &mut now, fast_wire, 100_000);
        assert!(by[0] > 99_000, "{by:?}");
    }

    #[test]
    fn even_on_the_slowest_of_wires_little_time_is_lost_by_trying() {
        let (mut choice, mut now) = (Choice::fastest(), Instant::now());
        let speeds = [1e6, 2e6, 4e6];
        let start = now;
        let by = send(&mut choice, &mut now, speeds, 2000);
        let best = 2000.0 * FRAME as f64 / speeds[2];
        let took = now.duration_since(start).as_secs_f64();
        assert!(took < best * 1.2, "{took:.1} s instead of {best:.1} s: {by:?}");
    }

    #[test]
    fn rest_is_no_time_of_any_way() {
        let (mut choice, mut now) = (Choice::fastest(), Instant::now());
        let speeds = [100e6, 900e6, 50e6];
        for _ in 0..200 {
            send(&mut choice, &mut now, speeds, 10);
            choice.rest();
            now += Duration::from_secs(3);
        }
        assert_eq!(send(&mut choice, &mut now, speeds, 10), [0, 10, 0]);
    }

    #[test]
    fn what_is_fixed_stays() {
        for codec in ALL {
            let (mut choice, mut now) = (Choice::fixed(codec), Instant::now());
            for _ in 0..1000 {
                assert_eq!(choice.next(FRAME, now), codec);
                now += Duration::from_millis(100);
            }
        }
    }
}
