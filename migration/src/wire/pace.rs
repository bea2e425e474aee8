//! Keeping to a bandwidth.

use std::thread;
use std::time::{Duration, Instant};

use crate::patience::{Cancel, TICK};

/// A token bucket: holds a tick's worth, starts full.
#[derive(Debug)]
pub(crate) struct Pace {
    limit: Option<u64>,
    /// When the bytes spent so far would have been sent at exactly the limit.
    due: Instant,
}

impl Pace {
    /// Keeps to `limit` bytes per second.
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Self { limit: limit.map(|limit| limit.max(1)), due: Instant::now() }
    }

    /// How many bytes each of `streams` may send in one go such that none waits long for its turn;
    /// none if there is no limit.
    pub(crate) fn fair_share(&self, streams: u64) -> Option<u64> {
        self.limit.map(|limit| limit / 8 / streams)
    }

    /// Accounts for `bytes` and sleeps while ahead of the limit, or until cancelled.
    pub(crate) fn spend(&mut self, bytes: u64, cancel: &Cancel) {
        let Some(limit) = self.limit else { return };
        let now = Instant::now();
        let cost = Duration::try_from_secs_f64(bytes as f64 / limit as f64);
        self.due = self.due.max(now.checked_sub(TICK).unwrap_or(now));
        self.due += cost.unwrap_or(Duration::MAX).min(Duration::from_secs(3600));
        while !cancel.is_cancelled() {
            let ahead = self.due.saturating_duration_since(Instant::now());
            if ahead.is_zero() {
                break;
            }
            thread::sleep(ahead.min(TICK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_kept() {
        let (mut pace, start) = (Pace::new(Some(1_000_000)), Instant::now());
        (0..30).for_each(|_| pace.spend(10_000, &Cancel::new()));
        let took = start.elapsed();
        let (least, most) = (Duration::from_millis(240), Duration::from_millis(2000));
        assert!((least..most).contains(&took), "{took:?}");
    }

    #[test]
    fn whoever_sleeps_can_be_cancelled() {
        let (cancel, start) = (Cancel::new(), Instant::now());
        cancel.cancel();
        Pace::new(Some(1)).spend(u64::MAX, &cancel);
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}
