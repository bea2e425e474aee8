//! Devices that come and go while the guest runs: each on a thread of its own, which asks the guest
//! and waits for its answer.

mod ask;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{Builder as Thread, JoinHandle};
use std::time::{Duration, Instant};

use devices::pci::PciFunction;
use devices::pci::bridge::BlockView;
use devices::shpc::Slots;

pub(crate) use ask::{Asking, put_in, take_back};
use ask::{Left, ask_back};

use crate::block::wait_until;
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
    asker: Box<dyn Asker>,
    result: Result<u8, String>,
}

/// Whoever wants a device in or out.
pub(crate) trait Asker: Send + fmt::Debug {
    /// The guest has come to another stage.
    fn tell(&mut self, progress: &SlotProgress);

    /// It is over: the slot that the device is in or was in, or why not.
    fn finish(self: Box<Self>, result: Result<u8, String>);
}

impl Asker for Replier {
    fn tell(&mut self, progress: &SlotProgress) {
        self.progress(progress);
    }

    fn finish(self: Box<Self>, result: Result<u8, String>) {
        Replier::finish(*self, result);
    }
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
        self.asker.finish(self.result);
    }
}

/// Brings a device in; `open` opens it on the thread.
pub(crate) fn plug(
    order: Order,
    slots: Arc<Slots>,
    open: Opener,
    asker: Box<dyn Asker>,
    events: Events,
) -> Result<Underway, (Box<dyn Asker>, io::Error)> {
    spawn(order, asker, events, move |order, cancel, tell| {
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
    asker: Box<dyn Asker>,
    events: Events,
) -> Result<Underway, (Box<dyn Asker>, io::Error)> {
    spawn(order, asker, events, move |order, cancel, tell| {
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

/// Waits until the guest has resumed a device that it paused elsewhere, and finds here.
pub(crate) fn await_resumed(
    order: Order,
    slots: Arc<Slots>,
    asker: Box<dyn Asker>,
    events: Events,
) -> Result<Underway, (Box<dyn Asker>, io::Error)> {
    spawn(order, asker, events, move |order, cancel, _| {
        let go_on = || if cancel.load(Ordering::Relaxed) { Err(()) } else { Ok(()) };
        match wait_until(&slots, deadline(order.limit), BlockView::is_resumed, go_on) {
            Ok(true) => (Ok(order.slot), None),
            _ => (Err("the guest does not say that it resumed its devices".into()), None),
        }
    })
}

fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit.min(LONGEST)
}

/// Does `work` on a thread, which sends [`Event::Plugged`] when it is about to end.
fn spawn(
    order: Order,
    asker: Box<dyn Asker>,
    events: Events,
    work: impl FnOnce(&Order, &AtomicBool, &mut dyn FnMut(SlotProgress)) -> Outcome + Send + 'static,
) -> Result<Underway, (Box<dyn Asker>, io::Error)> {
    let Order { serial, slot, .. } = order;
    let device = order.device.clone();
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = cancel.clone();
    // By a channel, so that whoever asked is answered where no thread can be had.
    let (hand, take) = channel::<Box<dyn Asker>>();
    let thread = Thread::new().name(format!("slot-{slot}")).spawn(move || {
        let mut asker = take.recv().expect("it is handed over once the thread is there");
        let (result, change) = work(&order, &flag, &mut |progress| asker.tell(&progress));
        events.send(Event::Plugged(serial));
        Finished { change, asker, result }
    });
    match thread {
        Ok(thread) => {
            hand.send(asker).expect("the thread waits for it");
            Ok(Underway { serial, device, slot, cancel, thread })
        }
        Err(error) => Err((asker, error)),
    }
}
