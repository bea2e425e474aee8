//! The slots of a bridge as the host handles them: cards go in and come out by asking the guest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::registers::{FIRST_DEVICE, FIRST_NUMBER};
use super::request::{Progress, Wish};
use super::slot::{Led, State, View};
use crate::pci::PciFunction;
use crate::pci::bridge::{BlockView, SlotBridge, SlotEvents};
use crate::pci::topology::{BusId, Place, PlaceError, Topology};

/// How long a driver takes at most to handle an interrupt, on a host that has much else to do.
const HANDLING: Duration = Duration::from_secs(3);
const GLANCE: Duration = Duration::from_millis(10);

/// Why a card does not go in or come out. Slots are named by the number that the guest knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// There is no such slot.
    #[error("there is no slot {0}")]
    NoSlot(u8),
    /// A card is in it.
    #[error("slot {0} is taken: choose another, or unplug what is in it")]
    Taken(u8),
    /// No card is in it.
    #[error("slot {0} is empty")]
    Empty(u8),
    /// The guest has no driver that would hear the button.
    #[error(
        "the guest does not listen at slot {0}: wait until it has booted, with a driver for \
         hot-plug controllers (Linux: CONFIG_HOTPLUG_PCI_SHPC)"
    )]
    Deaf(u8),
    /// The guest is at work on the slot already.
    #[error("the guest is busy with slot {0}: wait until its power light no longer blinks")]
    Busy(u8),
    /// The guest still uses the card.
    #[error("the guest still uses the device in slot {0}")]
    InUse(u8),
    /// The bus behind the bridge does not take the card.
    #[error("the bus of slot {0} does not take the device")]
    Place(u8, #[source] PlaceError),
}

/// How a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// What its number is, on the slot and in the guest.
    pub number: u8,
    /// What anybody sees.
    pub view: View,
    /// Whether the guest's driver hears the button.
    pub listening: bool,
    /// What was wished last and what became of it.
    pub request: Option<(Wish, Progress)>,
}

#[derive(Default)]
struct Requests {
    /// By slot.
    requests: Vec<Option<(Wish, Progress)>>,
    /// Counts the changes of any slot.
    changes: u64,
}

/// The slots behind one bridge.
pub struct Slots {
    topology: Arc<Topology>,
    bridge: Arc<SlotBridge>,
    behind: BusId,
    requests: Mutex<Requests>,
    changed: Condvar,
}

impl Slots {
    /// The slots of `bridge`, which leads to the bus `behind` of `topology`.
    pub fn new(topology: Arc<Topology>, bridge: Arc<SlotBridge>, behind: BusId) -> Arc<Self> {
        let count = bridge.shpc(|shpc| shpc.slots());
        let requests = Requests { requests: vec![None; count.into()], changes: 0 };
        let slots = Arc::new(Self {
            topology,
            bridge,
            behind,
            requests: Mutex::new(requests),
            changed: Condvar::new(),
        });
        slots.bridge.report_to(Arc::new(Ear(Arc::downgrade(&slots))));
        slots
    }

    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers of all slots.
    pub fn numbers(&self) -> impl Iterator<Item = u8> {
        (FIRST_NUMBER..).take(self.bridge.shpc(|shpc| shpc.slots()).into())
    }

    /// Where the function of the card in slot `number` is wired.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn place(&self, number: u8) -> Result<Place, SlotError> {
        let index = self.index(number)?;
        Ok(Place::new(self.behind, FIRST_DEVICE + index, 0))
    }

    fn index(&self, number: u8) -> Result<u8, SlotError> {
        let index = number.checked_sub(FIRST_NUMBER).ok_or(SlotError::NoSlot(number))?;
        let known = self.bridge.shpc(|shpc| shpc.view(index).is_some());
        if known { Ok(index) } else { Err(SlotError::NoSlot(number)) }
    }

    /// The function of the card in slot `number`.
    #[must_use]
    pub fn function(&self, number: u8) -> Option<Arc<dyn PciFunction>> {
        self.topology.get(self.place(number).ok()?)
    }

    /// How slot `number` stands.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn status(&self, number: u8) -> Result<Status, SlotError> {
        let index = self.index(number)?;
        let request = self.lock().requests[usize::from(index)];
        self.bridge.shpc(|shpc| {
            let view = shpc.view(index).ok_or(SlotError::NoSlot(number))?;
            Ok(Status { number, view, listening: shpc.hears_button(index), request })
        })
    }

    /// Whether the guest's driver hears the button of slot `number`, or comes to within a moment:
    /// while it handles an interrupt it masks all of them (Linux: `shpc_isr`).
    ///
    /// # Errors
    /// There is no such slot.
    pub fn comes_to_listen(&self, number: u8) -> Result<bool, SlotError> {
        let deadline = Instant::now() + HANDLING;
        loop {
            if self.status(number)?.listening {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            let _ = self.wait(self.changes(), deadline.min(Instant::now() + GLANCE));
        }
    }

    /// The lowest slot that is empty.
    #[must_use]
    pub fn free(&self) -> Option<u8> {
        self.numbers().find(|number| self.status(*number).is_ok_and(|slot| !slot.view.card))
    }

    /// Puts `function` into slot `number` before the guest runs.
    ///
    /// # Errors
    /// There is no such slot, or it is taken.
    pub fn insert_cold(&self, number: u8, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        let index = self.index(number)?;
        self.wire(number, function)?;
        self.bridge.touch(|shpc| shpc.insert_cold(index));
        self.topology.settle();
        Ok(())
    }

    fn wire(&self, number: u8, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        let place = self.place(number)?;
        self.topology.insert(place, function).map_err(|error| match error {
            PlaceError::Taken => SlotError::Taken(number),
            error => SlotError::Place(number, error),
        })
    }

    /// Puts `function` into slot `number` and presses the button; what the guest makes of it shows
    /// in [`Slots::status`].
    ///
    /// # Errors
    /// The slot is not there or taken, or the guest cannot be asked; nothing was done then.
    pub fn plug(&self, number: u8, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        let index = self.index(number)?;
        let Status { view, listening, .. } = self.status(number)?;
        if view.card {
            return Err(SlotError::Taken(number));
        }
        ready(number, view, listening)?;
        self.wire(number, function)?;
        self.ask(index, Wish::Plug);
        self.bridge.touch(|shpc| {
            shpc.insert(index);
            shpc.press_button(index);
        });
        Ok(())
    }

    /// Asks the guest to let go of the card in slot `number`; what it makes of that shows in
    /// [`Slots::status`]. Once that is done, [`Slots::take_out`] gives the card.
    ///
    /// If the slot has no power already, it is done at once.
    ///
    /// # Errors
    /// The slot is not there or empty, or the guest cannot be asked; nothing was done then.
    pub fn ask_back(&self, number: u8) -> Result<(), SlotError> {
        let index = self.index(number)?;
        let Status { view, listening, .. } = self.status(number)?;
        if !view.card {
            return Err(SlotError::Empty(number));
        }
        if (view.state, view.power) == (State::Disabled, Led::Off) {
            self.lock().requests[usize::from(index)] = Some((Wish::Unplug, Progress::Done));
            return Ok(());
        }
        ready(number, view, listening)?;
        self.ask(index, Wish::Unplug);
        self.bridge.touch(|shpc| shpc.press_button(index));
        Ok(())
    }

    fn ask(&self, index: u8, wish: Wish) {
        self.lock().requests[usize::from(index)] = Some((wish, Progress::Asked));
    }

    /// Presses the button of slot `number` again if the guest took notice of the last press and did
    /// nothing. Linux ignores one that comes while it still ends what it did before.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn press_again(&self, number: u8) -> Result<(), SlotError> {
        let index = self.index(number)?;
        let request = self.lock().requests[usize::from(index)];
        if matches!(request, Some((_, Progress::Asked))) {
            self.bridge.touch(|shpc| {
                if !shpc.is_pressed(index) {
                    shpc.press_button(index);
                }
            });
        }
        Ok(())
    }

    /// Gives up what was wished of slot `number`. If the guest still waits before it begins, a
    /// second press tells it so; one that it has not noticed yet is withdrawn.
    ///
    /// # Errors
    /// There is no such slot.
    pub fn give_up(&self, number: u8) -> Result<(), SlotError> {
        let index = self.index(number)?;
        let request = self.lock().requests[usize::from(index)].take();
        self.bridge.touch(|shpc| match request {
            Some((_, Progress::Accepted)) => shpc.press_button(index),
            Some((_, Progress::Asked)) => shpc.withdraw_press(index),
            _ => {}
        });
        Ok(())
    }

    /// Takes the card out of slot `number`, which has no power: nothing of it is left in the
    /// machine.
    ///
    /// # Errors
    /// The slot is not there or empty, or the guest uses what is in it.
    pub fn take_out(&self, number: u8) -> Result<Arc<dyn PciFunction>, SlotError> {
        let index = self.index(number)?;
        // Looked at and pulled in one step: the guest may power the slot at any time.
        self.bridge.touch(|shpc| {
            let view = shpc.view(index).ok_or(SlotError::NoSlot(number))?;
            if !view.card {
                return Err(SlotError::Empty(number));
            }
            if view.state != State::Disabled {
                return Err(SlotError::InUse(number));
            }
            shpc.pull(index);
            Ok(())
        })?;
        self.lock().requests[usize::from(index)] = None;
        self.topology.remove(self.place(number)?).ok_or(SlotError::Empty(number))
    }

    /// What host and guest wrote to the migration block of the bridge.
    #[must_use]
    pub fn block(&self) -> BlockView {
        self.bridge.block()
    }

    /// The bits that stand for slots in a [`BlockView`].
    ///
    /// # Errors
    /// There is no slot of one of these numbers.
    pub fn mask(&self, numbers: &[u8]) -> Result<u32, SlotError> {
        numbers.iter().try_fold(0, |mask, number| Ok(mask | 1 << self.index(*number)?))
    }

    /// Tells the guest whether what devices write is to be written by a CPU as well. It does as
    /// told from when [`BlockView::dirtying_began`] follows; a guest that promises nothing does not.
    pub fn want_dirtying(&self, wanted: bool) {
        self.bridge.want_dirtying(wanted);
    }

    /// Asks the guest to pause what is in the slots of these numbers, and forgets what it answered
    /// before. It has when [`BlockView::is_answered`].
    ///
    /// # Errors
    /// There is no slot of one of these numbers; nothing is asked then.
    pub fn ask_to_pause(&self, numbers: &[u8]) -> Result<(), SlotError> {
        self.bridge.ask_to_pause(self.mask(numbers)?);
        Ok(())
    }

    /// Tells the guest to resume what it paused, if only in part. It has when
    /// [`BlockView::is_resumed`].
    pub fn let_resume(&self) {
        self.bridge.let_resume();
    }

    /// How often anything changed; to be given to [`Slots::wait`].
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Waits until the guest changed something after `seen`, at most until `deadline`; how often
    /// anything changed by then.
    #[must_use]
    pub fn wait(&self, seen: u64, deadline: Instant) -> u64 {
        let mut requests = self.lock();
        while requests.changes == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let woken = self.changed.wait_timeout(requests, left);
            requests = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        requests.changes
    }
}

/// Whether the guest can be asked to do something with a slot.
fn ready(number: u8, view: View, listening: bool) -> Result<(), SlotError> {
    if view.power == Led::Blink || view.state == State::PoweredOnly {
        Err(SlotError::Busy(number))
    } else if listening {
        Ok(())
    } else {
        Err(SlotError::Deaf(number))
    }
}

/// What the bridge tells of its slots.
struct Ear(Weak<Slots>);

impl SlotEvents for Ear {
    fn changed(&self, slot: u8, _was: View, is: View) {
        let Some(slots) = self.0.upgrade() else { return };
        let mut requests = slots.lock();
        requests.changes += 1;
        if let Some(Some((wish, progress))) = requests.requests.get_mut(usize::from(slot)) {
            *progress = progress.with(*wish, is);
        }
        drop(requests);
        slots.changed.notify_all();
    }

    fn told(&self) {
        let Some(slots) = self.0.upgrade() else { return };
        slots.lock().changes += 1;
        slots.changed.notify_all();
    }
}

#[cfg(test)]
#[path = "slots/tests.rs"]
mod tests;
