//! The straight line out of a file.

use std::time::Instant;

use super::Damage;
use crate::destination::prepare;
use crate::error::{Error, Failure};
use crate::guest::{Arriving, Host};
use crate::patience::{Cancel, Patience};
use crate::progress::Watch;
use crate::ram::receive::Passes;
use crate::report::{Report, Status, milliseconds};
use crate::state::StateReader;
use crate::wire::{Channel, Lanes, Message, PeerError, Stream};

/// Builds the guest that `file` holds, and lets it run if it ran when it was written.
///
/// The file is not trusted: it is checked as what a peer sends is, all of it before the guest runs.
pub fn restore<H: Host, S: Stream>(
    host: &mut H,
    file: S,
    mut watch: Watch<'_>,
) -> Result<(H::Guest, Report), Box<Failure>> {
    let (start, mut report) = (Instant::now(), Report::default());
    let restored = read(host, file, &mut watch, &mut report);
    report.total_ms = milliseconds(start.elapsed());
    match restored {
        Ok(guest) => {
            report.status = Status::Completed;
            Ok((guest, report))
        }
        Err(error) => Err(Failure::of(error, report)),
    }
}

fn read<H: Host, S: Stream>(
    host: &mut H,
    file: S,
    watch: &mut Watch<'_>,
    report: &mut Report,
) -> Result<H::Guest, Error> {
    let Patience { silence, .. } = Patience::default();
    let mut file = Channel::new(file, silence, watch.cancel.clone()).map_err(Damage::told)?;
    file.greeted(silence).map_err(Damage::told)?;
    let offer = match file.receive_message(silence).map_err(Damage::told)? {
        Message::Offer { offer, dry_run: false, streams: 1 } => offer,
        other => return Err(Damage::told(file.unexpected(&other))),
    };
    let mut guest = prepare(host, &offer, None).map_err(Error::Misfit)?;
    let passes = Passes::new(guest.ram(), silence, Cancel::new());
    let received = passes.receive(&mut file, &mut Lanes::new(), None, watch.progress);
    let (state, rounds) = received.map_err(Damage::told)?;
    let arrived = file.totals();
    match file.receive_message(silence).map_err(Damage::told)? {
        Message::End(totals) if totals == arrived => {}
        Message::End(_) => {
            return Err(Damage::told(file.garbage("less or more than was written".into())));
        }
        other => return Err(Damage::told(file.unexpected(&other))),
    }
    match file.comes(silence) {
        Err(PeerError::Closed { .. }) => {}
        Err(error) => return Err(Damage::told(error)),
        Ok(_) => return Err(Damage::told(file.garbage("something behind the end".into()))),
    }
    let mut reader = StateReader::open(&state)?;
    guest.load(&mut reader)?;
    reader.finish()?;
    (report.streams, report.rounds) = (1, rounds);
    report.state_bytes = arrived.state_bytes;
    Lanes::new().carried(&file).account(report);
    if watch.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    guest.run().map_err(Error::Start)?;
    Ok(guest)
}
