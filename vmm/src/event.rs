//! What happens to a machine, from wherever, as one queue for the one loop that acts on it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventOps, EventSet, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config::DeviceId;
use crate::control::Call;
use crate::guest::Leaving;
use crate::migrate::{Arrival, Departure};
use crate::snapshot::{Restored, Snapped};

/// Something that the main loop has to act on.
#[derive(Debug)]
pub(crate) enum Event {
    /// The guest switched itself off.
    Off,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on.
    Died {
        /// Which.
        vcpu: u8,
        /// Why.
        why: String,
    },
    /// The user asked at the console for the end.
    Quit,
    /// A signal asked for the end.
    Signal(i32),
    /// Somebody called by the control socket.
    Call(Call),
    /// The guest left, or did not.
    Departed(Box<Departure>),
    /// The guest was written to a file, or was not.
    Snapped(Box<Snapped>),
    /// A guest was read from a file, or was not.
    Restored(Box<Restored>),
    /// A guest arrived, or did not.
    Arrived(Box<Arrival>),
    /// A guest that stood still in an undecided migration goes on here.
    TakenBack(Box<Leaving>),
    /// The host wants this device back, and asks for it again and again.
    DeviceWanted(DeviceId),
    /// This device had an error that it cannot correct.
    DeviceFailed(DeviceId),
    /// The plugging or unplugging with this serial number is over.
    Plugged(u64),
}

/// Where events are sent to, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    sender: Sender<Event>,
    wake: Wake,
}

/// Where they come out.
#[derive(Debug)]
pub(crate) struct Queue {
    receiver: Receiver<Event>,
    wake: Wake,
}

/// Makes the event loop turn when there are events.
#[derive(Clone, Debug)]
pub(crate) struct Wake(Arc<EventFd>);

/// A new queue.
pub(crate) fn queue() -> io::Result<(Events, Queue)> {
    let (sender, receiver) = channel();
    let wake = Wake(Arc::new(EventFd::new(EFD_NONBLOCK)?));
    Ok((Events { sender, wake: wake.clone() }, Queue { receiver, wake }))
}

impl Events {
    /// Puts `event` into the queue. After the loop ended, nobody wants it.
    pub(crate) fn send(&self, event: Event) {
        if self.sender.send(event).is_ok()
            && let Err(error) = self.wake.0.write(1)
        {
            tracing::error!(%error, "cannot wake the main loop");
        }
    }
}

impl Queue {
    /// What has to be in the event loop.
    pub(crate) fn wake(&self) -> &Wake {
        &self.wake
    }

    /// The next event, if there is one.
    pub(crate) fn next(&self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(event_manager::Events::new(&*self.0, EventSet::IN)) {
            tracing::error!(%error, "the main loop will not hear of events");
        }
    }

    fn process(&mut self, _: event_manager::Events, _: &mut EventOps<'_>) {
        // The loop takes all events after each turn; this only lets it sleep again.
        let _ = self.0.read();
    }
}
