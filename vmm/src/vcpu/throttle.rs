//! Keeping vCPUs from running for a part of the time, so that their guest writes less.
//!
//! A thread tells all of them together to rest, again and again: those that wait for each other
//! run at the same time. KVM does not tell which of them writes how much on every processor (where
//! the hardware logs writes, there are no faults to count), so that all get the same share.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::Vcpus;

/// How long a turn is: running, then resting. Short enough to be no pause by itself.
const TURN: Duration = Duration::from_millis(20);
/// How long a vCPU runs at least in each turn, which lasts longer if need be.
const LEAST_RUN: Duration = Duration::from_millis(1);
/// More than that is a stop.
const MOST: u8 = 99;

/// Slows all vCPUs of a machine down, until it is dropped.
pub(crate) struct Throttle {
    vcpus: Arc<Vcpus>,
    /// What tells them to rest, while there is something to tell.
    working: Option<(Sender<u8>, JoinHandle<()>)>,
}

impl Throttle {
    /// Does nothing yet.
    pub(crate) fn new(vcpus: Arc<Vcpus>) -> Self {
        Self { vcpus, working: None }
    }

    /// Keeps the vCPUs from running for `percent` of the time from now on.
    pub(crate) fn set(&mut self, percent: u8) {
        let percent = percent.min(MOST);
        match &self.working {
            _ if percent == 0 => self.stop(),
            Some((changes, _)) => {
                changes.send(percent).expect("the thread listens until it is told to end");
            }
            None => {
                let (changes, heard) = channel();
                let vcpus = self.vcpus.clone();
                let work = move || work(&vcpus, percent, &heard);
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
        self.vcpus.rest(Duration::ZERO);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn work(vcpus: &Vcpus, mut percent: u8, changes: &Receiver<u8>) {
    loop {
        let (run, rest) = turn(percent);
        vcpus.rest(rest);
        match changes.recv_timeout(run + rest) {
            Ok(change) => percent = change,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// How long vCPUs run and rest in each turn that rest for `percent`, below 100, of the time.
fn turn(percent: u8) -> (Duration, Duration) {
    let (rests, runs) = (u32::from(percent), u32::from(100 - percent));
    let run = (TURN * runs / 100).max(LEAST_RUN);
    (run, run * rests / runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_has_the_share_that_was_asked_for() {
        for percent in 1..=MOST {
            let (run, rest) = turn(percent);
            let share = rest.as_secs_f64() / (run + rest).as_secs_f64();
            assert!((share * 100.0 - f64::from(percent)).abs() < 0.01, "{percent}: {share}");
            assert!(run >= LEAST_RUN && run + rest <= 5 * TURN, "{percent}");
        }
    }
}
