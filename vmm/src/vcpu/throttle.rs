//! Keeping vCPUs from running for a part of the time, so that their guest writes less.
//!
//! A thread tells those that are slowed down to rest, all of them together, again and again: those
//! that wait for each other run at the same time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use migration::policy::Shares;

use super::Vcpus;

/// How long a turn is: running, then resting. Short enough to be no pause by itself.
const TURN: Duration = Duration::from_millis(20);
/// How long a vCPU runs at least in each turn, which lasts longer if need be.
const LEAST_RUN: Duration = Duration::from_millis(1);
/// More than that is a stop.
const MOST: u8 = 99;

/// Slows vCPUs of a machine down, until it is dropped.
pub(crate) struct Throttle {
    vcpus: Arc<Vcpus>,
    /// What tells them to rest, while there is something to tell.
    working: Option<(Sender<Shares>, JoinHandle<()>)>,
}

impl Throttle {
    /// Does nothing yet.
    pub(crate) fn new(vcpus: Arc<Vcpus>) -> Self {
        Self { vcpus, working: None }
    }

    /// Keeps vCPUs from running for so much of the time from now on.
    pub(crate) fn set(&mut self, shares: &Shares) {
        match &self.working {
            _ if shares.most() == 0 => self.stop(),
            Some((changes, _)) => {
                changes.send(shares.clone()).expect("the thread listens until it is told to end");
            }
            None => {
                let (changes, heard) = channel();
                let (vcpus, shares) = (self.vcpus.clone(), shares.clone());
                let work = move || work(&vcpus, shares, &heard);
                match Builder::new().name("throttle".into()).spawn(work) {
                    Ok(thread) => self.working = Some((changes, thread)),
                    Err(error) => tracing::warn!(%error, "cannot slow the guest down"),
                }
            }
        }
    }

    fn stop(&mut self) {
        let Some((changes, thread)) = self.working.take() else { return };
        drop(changes);
        if thread.join().is_err() {
            tracing::error!("the thread that slows vCPUs down panicked");
        }
        self.vcpus.rest(|_| Some(Duration::ZERO));
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn work(vcpus: &Vcpus, mut shares: Shares, changes: &Receiver<Shares>) {
    loop {
        let turn = turn(shares.most());
        vcpus.rest(|vcpu| rest(turn, shares.of(vcpu)));
        match changes.recv_timeout(turn) {
            Ok(change) => shares = change,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// How long a turn lasts in which some vCPU rests for `most` percent of the time.
fn turn(most: u8) -> Duration {
    let runs = 100 - u32::from(most.min(MOST));
    TURN.max(LEAST_RUN * 100 / runs)
}

/// How long a vCPU rests in a turn so that it does for `percent` of the time; none if it need not.
fn rest(turn: Duration, percent: u8) -> Option<Duration> {
    (percent > 0).then(|| turn * u32::from(percent.min(MOST)) / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_turn_each_vcpu_has_the_share_that_was_asked_for() {
        for most in 1..=MOST {
            let turn = turn(most);
            assert!(turn >= TURN && turn <= 5 * TURN, "{most}: {turn:?}");
            assert!(turn - rest(turn, most).unwrap() >= LEAST_RUN, "{most}");
            for percent in 1..=most {
                let share = rest(turn, percent).unwrap().as_secs_f64() / turn.as_secs_f64();
                assert!((share * 100.0 - f64::from(percent)).abs() < 0.01, "{percent}: {share}");
            }
            assert_eq!(rest(turn, 0), None, "it is left alone");
        }
    }
}
