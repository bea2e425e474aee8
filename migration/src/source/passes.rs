//! Pass after pass over memory: while the guest runs, and the last once it stands still.

use std::io;
use std::sync::Mutex;
use std::time::Instant;

use super::Source;
use crate::error::Error;
use crate::guest::Departing;
use crate::patience::Cancel;
use crate::plan::Phase;
use crate::policy::{Decision, Outcome, Seen, Shares};
use crate::progress::{Progress, Stage, Watch};
use crate::ram::send::Pass;
use crate::ram::{self, PAGE, PageBitmap};
use crate::wire::{Channel, Message, Pace, Stream};

impl<G: Departing, S: Stream, C: FnMut(&Cancel) -> io::Result<S>> Source<'_, '_, G, S, C> {
    /// All memory, then again what was written meanwhile, until little is left: gives that.
    pub(super) fn precopy(&mut self, peer: &mut Channel<S>) -> Result<PageBitmap, Error> {
        peer.now("while it was sent memory");
        self.custody.guest().dirty().start()?;
        self.enter(peer, Phase::Precopy)?;
        let all = PageBitmap::full(self.custody.guest().ram());
        self.until_little_is_left(peer, all)
    }

    /// Sends `pages`, and again what was written meanwhile, until little is left: gives that.
    pub(super) fn until_little_is_left(
        &mut self,
        peer: &mut Channel<S>,
        mut pages: PageBitmap,
    ) -> Result<PageBitmap, Error> {
        let pace = Mutex::new(Pace::new(self.options.bandwidth_limit));
        let mut seen = Vec::new();
        loop {
            let (start, sent) = (Instant::now(), pages.count() * PAGE);
            self.pass(peer, &pages, &pace, Stage::Copying)?;
            self.lanes.tell(|_| Message::RoundEnd)?;
            peer.send(&Message::RoundEnd)?;
            match peer.receive_message(self.options.patience.silence)? {
                Message::RoundTaken => {}
                other => return Err(peer.unexpected(&other).into()),
            }
            pages.clear();
            let guest = self.custody.guest();
            guest.dirty().collect(&mut pages)?;
            let state = guest.state_size();
            let (left, by_vcpu) = (pages.count() * PAGE, guest.dirty().by_vcpu().to_vec());
            let (took, throttled) = (start.elapsed(), self.throttled.clone());
            seen.push(Seen { pages: sent, left, took, by_vcpu, throttled });
            if self.is_enough(&seen, self.lanes.carried(peer).rate, state)? {
                return Ok(pages);
            }
        }
    }

    /// Does what the policy says after the passes that were `seen`: whether they were the last.
    fn is_enough(&mut self, seen: &[Seen], rate: Option<f64>, state: u64) -> Result<bool, Error> {
        let policy = &self.options.policy;
        let decision = policy.decide(seen, rate, state);
        tracing::debug!(seen = ?seen.last(), rate, state, ?decision, "pass done");
        self.report.outcome = match decision {
            Decision::Continue => None,
            Decision::Throttle(shares) => {
                self.throttle(shares);
                None
            }
            Decision::SwitchOver { converged: false } => Some(Outcome::Forced),
            Decision::SwitchOver { .. } if self.progress.throttled_percent > 0 => {
                Some(Outcome::Throttled)
            }
            Decision::SwitchOver { .. } => Some(Outcome::Converged),
            Decision::GiveUp => {
                self.report.outcome = Some(Outcome::GaveUp);
                let dirtied = seen.last().map_or(0.0, Seen::dirtied);
                let stop = policy.stop_for(seen, rate, state);
                return Err(Error::NoConvergence { dirtied, stop, limit: policy.downtime_limit });
            }
        };
        Ok(self.report.outcome.is_some())
    }

    /// Keeps the vCPUs from running for so much of the time.
    pub(super) fn throttle(&mut self, shares: Shares) {
        self.custody.guest().throttle(&shares);
        let most = shares.most();
        self.progress.throttled_percent = most;
        if most >= self.report.throttled_percent {
            self.report.throttled_percent = most;
            self.report.throttled_vcpus = shares.each().to_vec();
        }
        self.throttled = shares;
    }

    /// What was left, and what was written since.
    pub(super) fn rest_of_memory(
        &mut self,
        peer: &mut Channel<S>,
        left: PageBitmap,
    ) -> Result<(), Error> {
        let mut pages = left;
        self.custody.guest().dirty().collect(&mut pages)?;
        tracing::debug!(pages = pages.count(), "the last");
        self.pass(peer, &pages, &Mutex::new(Pace::new(None)), Stage::Stopped)?;
        tracing::debug!("sent");
        Ok(self.lanes.tell(Message::End)?)
    }

    /// One pass over memory.
    fn pass(
        &mut self,
        peer: &mut Channel<S>,
        pages: &PageBitmap,
        pace: &Mutex<Pace>,
        stage: Stage,
    ) -> Result<(), Error> {
        let Self { custody, lanes, watch, progress, options, .. } = self;
        let Watch { progress: watcher, cancel, .. } = watch;
        let before = lanes.carried(peer).bytes;
        *progress = Progress {
            stage,
            round: progress.round + 1,
            round_bytes: pages.count() * PAGE,
            round_done: 0,
            bytes_sent: before,
            ..progress.clone()
        };
        watcher(progress);
        let ram = &custody.guest().ram().clone();
        let (untouched, checked) = (progress.round == 1, options.checked);
        let most = options.compression.most();
        let pass = Pass { ram, pages, untouched, checked, most, pace, cancel };
        let sent = ram::send::send(peer, lanes, &pass, custody.guest().dirty(), |sent| {
            progress.round_done = sent.pages;
            progress.bytes_sent = before + sent.content;
            watcher(progress);
        });
        self.account(peer);
        sent
    }
}
