//! Devices that come and go while the guest runs: each on a thread of its own, which asks the guest
//! and waits for its answer.

mod ask;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{Builder as Thread, JoinHandle};
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::shpc::Slots;

use ask::{Asking, Left, ask_back, put_in};

use crate::cause;
use crate::config::{DeviceConfig, DeviceId};
use crate::control::{Replier, SlotProgress};
use crate::event::{Event, Events};

/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// A device on its way in or out, as the main loop holds it.
#[derive(Debug)]
pub(crate) struct Underway {
    serial: u64,
    device: DeviceConfig,
    slot: u8,
    cancel: Arc<AtomicBool>,
    thread: JoinHandle<Finished>,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Finished {
    /// What the guest has now.
    pub(crate) change: Option<Change>,
    reply: Replier,
    result: Result<u8, String>,
}

/// A change of what the guest has.
#[derive(Debug)]
pub(crate) enum Change {
    /// This device, in this slot.
    In(DeviceConfig, u8),
    /// No longer this one.
    Out(DeviceId),
}

/// What is to be done with a slot.
pub(crate) struct Order {
    /// Tells this one from all others.
    pub(crate) serial: u64,
    pub(crate) device: DeviceConfig,
    pub(crate) slot: u8,
    /// How long the guest may take.
    pub(crate) limit: Duration,
}

/// Opens a device of the host.
pub(crate) type Opener =
    Box<dyn FnOnce(&DeviceConfig) -> Result<Arc<dyn PciFunction>, String> + Send>;

/// What came of an order, and the change that it made.
type Outcome = (Result<u8, String>, Option<Change>);

impl Underway {
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }

    pub(crate) fn device(&self) -> &DeviceConfig {
        &self.device
    }

    pub(crate) fn slot(&self) -> u8 {
        self.slot
    }

    /// Tells the thread to stop waiting for the guest.
    pub(crate) fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Waits for the thread's end, which is near. Nothing if it broke.
    pub(crate) fn finish(self) -> Option<Finished> {
        self.thread.join().ok()
    }
}

impl Finished {
    /// Tells whoever asked.
    pub(crate) fn answer(self) {
        self.reply.finish(self.result);
    }
}

/// Brings a device in; `open` opens it on the thread.
pub(crate) fn plug(
    order: Order,
    slots: Arc<Slots>,
    open: Opener,
    reply: Replier,
    events: Events,
) -> Result<Underway, (Replier, io::Error)> {
    spawn(order, reply, events, move |order, cancel, tell| {
        let Order { device, slot, limit, .. } = order;
        let function = match open(device) {
            Ok(function) => function,
            Err(why) => return (Err(why), None),
        };
        let asking = Asking::new(&slots, *slot, deadline(*limit), cancel, tell);
        match put_in(asking, function) {
            Ok(()) => (Ok(*slot), Some(Change::In(device.clone(), *slot))),
            Err((error, Left::Nothing)) => (Err(cause::chain(&error)), None),
            Err((error, Left::Card)) => {
                let why = format!(
                    "{}; the guest uses it all the same: it stays in slot {slot}",
                    cause::chain(&error)
                );
                (Err(why), Some(Change::In(device.clone(), *slot)))
            }
        }
    })
}

/// Brings a device out, and gives it back to the host.
pub(crate) fn unplug(
    order: Order,
    slots: Arc<Slots>,
    reply: Replier,
    events: Events,
) -> Result<Underway, (Replier, io::Error)> {
    spawn(order, reply, events, move |order, cancel, tell| {
        let asking = Asking::new(&slots, order.slot, deadline(order.limit), cancel, tell);
        match ask_back(asking) {
            Ok(()) => (Ok(order.slot), Some(Change::Out(order.device.id.clone()))),
            Err((error, Left::Card)) => (Err(cause::chain(&error)), None),
            Err((error, Left::Nothing)) => {
                (Err(cause::chain(&error)), Some(Change::Out(order.device.id.clone())))
            }
        }
    })
}

fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit.min(LONGEST)
}

/// Does `work` on a thread, which sends [`Event::Plugged`] when it is about to end.
fn spawn(
    order: Order,
    reply: Replier,
    events: Events,
    work: impl FnOnce(&Order, &AtomicBool, &mut dyn FnMut(SlotProgress)) -> Outcome + Send + 'static,
) -> Result<Underway, (Replier, io::Error)> {
    let Order { serial, slot, .. } = order;
    let device = order.device.clone();
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = cancel.clone();
    // By a channel, so that whoever asked is answered where no thread can be had.
    let (hand, take) = channel::<Replier>();
    let thread = Thread::new().name(format!("slot-{slot}")).spawn(move || {
        let mut reply = take.recv().expect("it is handed over once the thread is there");
        let (result, change) = work(&order, &flag, &mut |progress| reply.progress(&progress));
        events.send(Event::Plugged(serial));
        Finished { change, reply, result }
    });
    match thread {
        Ok(thread) => {
            hand.send(reply).expect("the thread waits for it");
            Ok(Underway { serial, device, slot, cancel, thread })
        }
        Err(error) => Err((reply, error)),
    }
}
