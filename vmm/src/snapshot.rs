//! Guests to and from files, as threads beside the main loop.

mod draft;

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread::Builder as Thread;

use migration::Failure;
use migration::progress::Watch;
use migration::record::NoRecord;
use migration::report::Report;
use migration::snapshot::{Afterwards, restore, save};

use draft::Draft;

use crate::control::{Replier, SnapshotRequest};
use crate::event::{Event, Events};
use crate::guest::{Awaiting, Builder, Leaving};
use crate::migrate::{Meter, NotBegun, Underway, tell};

/// What came of a guest that was to be written.
#[derive(Debug)]
pub(crate) struct Snapped {
    pub(crate) guest: Leaving,
    reply: Replier,
    afterwards: Afterwards,
    result: Result<Report, Box<Failure>>,
}

impl Snapped {
    /// Tells whoever asked for it; gives the guest, and whether it goes on.
    pub(crate) fn conclude(self) -> (Leaving, bool) {
        let Self { guest, reply, afterwards, result } = self;
        let goes_on = result.is_err() || afterwards == Afterwards::Run;
        reply.finish(Ok(tell(&result.unwrap_or_else(|failure| failure.report))));
        (guest, goes_on)
    }
}

/// What came of a file.
pub(crate) type Restored = Result<Awaiting, Box<Failure>>;

/// Writes `guest` on a thread of its own; [`Event::Snapped`] brings it back.
pub(crate) fn write(
    guest: Leaving,
    request: SnapshotRequest,
    reply: Replier,
    events: Events,
) -> Result<Underway, Box<NotBegun>> {
    let SnapshotRequest { file, stop } = request;
    let (draft, sheet) = match Draft::begin(&file) {
        Ok(begun) => begun,
        Err(error) => return Err(Box::new(NotBegun { guest, reply, error })),
    };
    let underway = Underway::new();
    let mut meter = Meter::new(&underway);
    let cancel = underway.cancel.clone();
    let afterwards = if stop { Afterwards::Stand } else { Afterwards::Run };
    // By a channel, so that the guest is not lost where no thread can be had.
    let (hand, take) = channel::<(Leaving, Replier)>();
    let thread = Thread::new().name("snapshot".into()).spawn(move || {
        let Ok((mut guest, mut reply)) = take.recv() else { return };
        let mut progress = |now: &migration::progress::Progress| {
            if let Some(progress) = meter.measure(now) {
                reply.progress(&progress);
            }
        };
        let watch = Watch { progress: &mut progress, cancel, record: Box::new(NoRecord) };
        let result = save(&mut guest, sheet, || draft.keep(), afterwards, watch);
        events.send(Event::Snapped(Box::new(Snapped { guest, reply, afterwards, result })));
    });
    match thread {
        Ok(_) => {
            hand.send((guest, reply)).expect("the thread waits for it");
            Ok(underway)
        }
        Err(error) => Err(Box::new(NotBegun { guest, reply, error })),
    }
}

/// Reads the guest that `path` holds on a thread of its own; [`Event::Restored`] brings it.
pub(crate) fn read(path: &PathBuf, mut builder: Builder, events: Events) -> io::Result<Underway> {
    if !fs::metadata(path)?.is_file() {
        // Reading from anything else may never end.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    let file = File::open(path)?;
    let underway = Underway::new();
    let mut meter = Meter::new(&underway);
    let cancel = underway.cancel.clone();
    Thread::new().name("snapshot".into()).spawn(move || {
        let mut progress = |now: &migration::progress::Progress| {
            meter.measure(now);
        };
        let watch = Watch { progress: &mut progress, cancel, record: Box::new(NoRecord) };
        let restored = restore(&mut builder, file, watch).map(|(guest, _)| guest);
        events.send(Event::Restored(Box::new(restored)));
    })?;
    Ok(underway)
}
