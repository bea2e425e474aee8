//! The straight line into a file.

use std::io;
use std::sync::Mutex;
use std::time::Instant;

use crate::compat::Offer;
use crate::error::{Error, Failure};
use crate::guest::Departing;
use crate::patience::Patience;
use crate::plan::Phase;
use crate::policy::Outcome;
use crate::progress::{Progress, Stage, Watch};
use crate::ram::send::Pass;
use crate::ram::{self, PAGE, PageBitmap};
use crate::report::{Report, Status, milliseconds};
use crate::state::StateWriter;
use crate::wire::{Channel, FRAME_LIMIT, Lanes, Message, Pace, PeerError, Stream};

/// What becomes of a guest once its snapshot is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes on.
    Run,
    /// It stands still: whoever holds it ends it.
    Stand,
}

/// Stops `guest`, writes it to `file`, and has `keep` make that last.
///
/// Whatever fails, the guest goes on as if nothing had happened. It stands still only where this
/// succeeds and `afterwards` says so: no copy misses what it did after it was written.
pub fn save<G: Departing, S: Stream>(
    guest: &mut G,
    file: S,
    keep: impl FnOnce() -> io::Result<()>,
    afterwards: Afterwards,
    mut watch: Watch<'_>,
) -> Result<Report, Box<Failure>> {
    let (start, mut report) = (Instant::now(), Report::default());
    let mut still = Still { guest, goes_on: true };
    let saved = write(still.guest, file, &mut watch, &mut report)
        .and_then(|()| keep().map_err(Error::Write));
    if saved.is_ok() && afterwards == Afterwards::Stand {
        still.goes_on = false;
    }
    let stopped = still.guest.plan().stopped();
    drop(still);
    report.downtime_ms = stopped.map_or(0, |since| milliseconds(since.elapsed()));
    report.total_ms = milliseconds(start.elapsed());
    report.devices = guest.devices();
    match saved {
        Ok(()) => {
            report.status = Status::Completed;
            Ok(report)
        }
        Err(error) => Err(Failure::of(error, report)),
    }
}

/// A guest that is brought to a stop. Dropping it lets the guest go on, if it does.
struct Still<'a, G: Departing> {
    guest: &'a mut G,
    goes_on: bool,
}

impl<G: Departing> Drop for Still<'_, G> {
    fn drop(&mut self) {
        self.guest.dirty().stop();
        if self.goes_on {
            self.guest.plan().undo();
        }
    }
}

fn write<G: Departing, S: Stream>(
    guest: &mut G,
    file: S,
    watch: &mut Watch<'_>,
    report: &mut Report,
) -> Result<(), Error> {
    stop(guest, watch)?;
    // Nobody may write any more, and who does is found out.
    guest.dirty().start()?;
    let silence = Patience::default().silence;
    let mut file = Channel::new(file, silence, watch.cancel.clone()).map_err(told)?;
    file.begin().map_err(told)?;
    let offer = Offer { ram: ram::layout(guest.ram()), ..guest.offer() };
    file.send(&Message::Offer { offer, dry_run: false, streams: 1 }).map_err(told)?;
    memory(guest, &mut file, watch)?;
    let mut state = StateWriter::new();
    guest.save(&mut state)?;
    report.state_bytes = state.bytes().len() as u64;
    file.send_state(state.bytes()).map_err(told)?;
    let mut pages = PageBitmap::empty(guest.ram());
    if let Some((name, run)) = guest.dirty().culprit(&mut pages)? {
        return Err(Error::WroteTooLate { name, address: run.start.0 });
    }
    file.send(&Message::End(file.totals())).map_err(told)?;
    (report.streams, report.rounds) = (1, 1);
    report.outcome = Some(Outcome::Converged);
    Lanes::new().carried(&file).account(report);
    Ok(())
}

/// From running to perfectly still.
fn stop<G: Departing>(guest: &mut G, watch: &mut Watch<'_>) -> Result<(), Error> {
    let cancel = watch.cancel.clone();
    let mut meanwhile =
        || if cancel.is_cancelled() { Err(Error::Cancelled.into()) } else { Ok(()) };
    let stays = |error| if cancel.is_cancelled() { Error::Cancelled } else { Error::Stays(error) };
    guest.prepare(&mut meanwhile).map_err(stays)?;
    for phase in [Phase::Precopy, Phase::Release, Phase::Quiesce] {
        match guest.plan().enter(phase, &mut meanwhile) {
            Err(_) if cancel.is_cancelled() => return Err(Error::Cancelled),
            entered => entered?,
        }
    }
    Ok(())
}

fn memory<G: Departing, S: Stream>(
    guest: &mut G,
    file: &mut Channel<S>,
    watch: &mut Watch<'_>,
) -> Result<(), Error> {
    let (ram, pages) = (&guest.ram().clone(), PageBitmap::full(guest.ram()));
    let Watch { progress: watcher, cancel, .. } = watch;
    let round_bytes = pages.count() * PAGE;
    let mut progress =
        Progress { stage: Stage::Stopped, round: 1, round_bytes, ..Progress::default() };
    watcher(&progress);
    let pace = Mutex::new(Pace::new(None));
    let pass = Pass {
        ram,
        pages: &pages,
        untouched: true,
        checked: true,
        most: FRAME_LIMIT,
        pace: &pace,
        cancel,
    };
    let sent = ram::send::send(file, &mut Lanes::new(), &pass, guest.dirty(), |sent| {
        (progress.round_done, progress.bytes_sent) = (sent.pages, sent.content);
        watcher(&progress);
    });
    sent.map_err(|error| match error {
        Error::Peer(error) => told(error),
        error => error,
    })
}

/// What an error of a connection means where there is only a file.
fn told(error: PeerError) -> Error {
    match error {
        PeerError::Io { source, .. } => Error::Write(source),
        error => error.into(),
    }
}
