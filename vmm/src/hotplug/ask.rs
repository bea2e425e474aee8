//! Asking the guest to take a card or to let go of it, and waiting for what it does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::shpc::{Progress, SlotError, Slots, State, Status, View, Wish};

use crate::control::{SlotProgress, SlotStage};

/// How long it takes at most to notice that nobody waits any more.
const TICK: Duration = Duration::from_millis(100);
/// How long a guest may take from a press of the button that it saw to the first sign that it will
/// do something; if there is none, the button is pressed again.
const AGAIN: Duration = Duration::from_secs(3);
/// How long an access to a device may go on that began before the device was taken out.
const LAST_ACCESS: Duration = Duration::from_secs(5);

/// Why a card is not where it was wished to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The guest was not asked, or not any more.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The button was pressed and nothing came of it.
    #[error(
        "the guest did not answer in time when slot {0} asked: look whether its hot-plug driver \
         (Linux: shpchp) works, and try again"
    )]
    Ignored(u8),
    /// The guest began and did not come to an end.
    #[error(
        "the guest began to work on slot {0} and was not done in time: give it more with --timeout"
    )]
    Unfinished(u8),
    /// The guest tried and could not.
    #[error(
        "the guest refused the device in slot {0} and lit its attention light: see the guest's log \
         (Linux: dmesg, shpchp)"
    )]
    Refused(u8),
    /// The guest let everything be as it was.
    #[error(
        "the guest left slot {0} as it was: the button was pressed twice, or its driver cannot; \
         see the guest's log (Linux: dmesg, shpchp)"
    )]
    Cancelled(u8),
    /// The guest was switched off, reset or ended.
    #[error("the guest was reset or ended before it was done with slot {0}")]
    Abandoned(u8),
    /// The device is out but still in use by this process.
    #[error("the device came out of slot {0}, but an access to it does not end")]
    Held(u8),
}

/// What an error left in the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// The card.
    Card,
    /// No card.
    Nothing,
}

/// A wait for a guest.
pub(crate) struct Asking<'a> {
    slots: &'a Slots,
    number: u8,
    deadline: Instant,
    cancel: &'a AtomicBool,
    tell: &'a mut dyn FnMut(SlotProgress),
}

/// Puts `function` into the slot and waits until the guest uses it. Of one that the guest does not
/// take, nothing is left in the machine when this returns.
pub(crate) fn put_in(
    mut asking: Asking<'_>,
    function: Arc<dyn PciFunction>,
) -> Result<(), (Error, Left)> {
    let (slots, number) = (asking.slots, asking.number);
    let plugged = heard(slots, number, || slots.plug(number, function.clone()));
    drop(function);
    plugged.map_err(|error| (error.into(), Left::Nothing))?;
    let Err(error) = asking.wait() else { return Ok(()) };
    // Wrong number or none: neither can be, it went in.
    let _ = slots.give_up(number);
    match slots.take_out(number) {
        Ok(function) => match release(number, function) {
            Ok(()) => Err((error, Left::Nothing)),
            Err(held) => Err((held, Left::Nothing)),
        },
        Err(_) => Err((error, Left::Card)),
    }
}

/// Asks the guest to let go of the card in the slot, takes it out and lets it go.
pub(crate) fn ask_back(asking: Asking<'_>) -> Result<(), (Error, Left)> {
    let number = asking.number;
    let function = take_back(asking)?;
    release(number, function).map_err(|error| (error, Left::Nothing))
}

/// Asks the guest to let go of the card in the slot, and takes it out. On an error it is where it
/// was.
pub(crate) fn take_back(mut asking: Asking<'_>) -> Result<Arc<dyn PciFunction>, (Error, Left)> {
    let (slots, number) = (asking.slots, asking.number);
    heard(slots, number, || slots.ask_back(number)).map_err(|error| (error.into(), Left::Card))?;
    if let Err(error) = asking.wait() {
        let _ = slots.give_up(number);
        return Err((error, Left::Card));
    }
    slots.take_out(number).map_err(|error| (error.into(), Left::Card))
}

/// Asks, and once more if the guest did not listen just then but does in a moment.
fn heard(
    slots: &Slots,
    number: u8,
    mut ask: impl FnMut() -> Result<(), SlotError>,
) -> Result<(), SlotError> {
    match ask() {
        Err(SlotError::Deaf(_)) if slots.comes_to_listen(number)? => ask(),
        asked => asked,
    }
}

/// Drops `function`, and waits until the last access that began before is over.
fn release(number: u8, function: Arc<dyn PciFunction>) -> Result<(), Error> {
    let watch: Weak<dyn PciFunction> = Arc::downgrade(&function);
    drop(function);
    let deadline = Instant::now() + LAST_ACCESS;
    while watch.strong_count() > 0 {
        if Instant::now() > deadline {
            return Err(Error::Held(number));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl<'a> Asking<'a> {
    /// About slot `number` until `deadline`, or until `cancel` is set; `tell` hears of each step.
    pub(crate) fn new(
        slots: &'a Slots,
        number: u8,
        deadline: Instant,
        cancel: &'a AtomicBool,
        tell: &'a mut dyn FnMut(SlotProgress),
    ) -> Self {
        Self { slots, number, deadline, cancel, tell }
    }

    /// Waits until what was wished is so.
    fn wait(&mut self) -> Result<(), Error> {
        let number = self.number;
        let (mut told, mut pressed) = (None, Instant::now());
        loop {
            let seen = self.slots.changes();
            let Status { view, request, .. } = self.slots.status(number)?;
            let (wish, progress) = request.ok_or(Error::Cancelled(number))?;
            let stage = stage(wish, progress, view);
            if told != Some(stage) {
                (self.tell)(SlotProgress { slot: number, stage });
                told = Some(stage);
            }
            if pressed.elapsed() > AGAIN {
                self.slots.press_again(number)?;
                pressed = Instant::now();
            }
            match progress {
                Progress::Done => return Ok(()),
                Progress::Refused => return Err(Error::Refused(number)),
                Progress::Cancelled => return Err(Error::Cancelled(number)),
                _ if self.cancel.load(Ordering::Relaxed) => return Err(Error::Abandoned(number)),
                _ if Instant::now() < self.deadline => {}
                Progress::Asked => return Err(Error::Ignored(number)),
                Progress::Accepted => return Err(Error::Unfinished(number)),
            }
            let _ = self.slots.wait(seen, self.deadline.min(Instant::now() + TICK));
        }
    }
}

/// How far it is, for people.
fn stage(wish: Wish, progress: Progress, view: View) -> SlotStage {
    match (wish, progress, view.state) {
        (_, Progress::Refused | Progress::Cancelled, _) => SlotStage::Refused,
        (_, Progress::Asked, _) => SlotStage::Asked,
        (Wish::Plug, _, State::PoweredOnly) => SlotStage::Powered,
        (Wish::Plug, _, State::Enabled) => SlotStage::Enabled,
        (Wish::Unplug, _, State::Disabled) => SlotStage::Released,
        _ => SlotStage::Accepted,
    }
}

#[cfg(test)]
#[path = "ask/tests.rs"]
mod tests;
