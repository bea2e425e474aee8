//! The guest's own wish to be switched off or reset, on its way to the main loop.

use std::sync::atomic::{AtomicBool, Ordering};

use devices::legacy::Power;

use crate::event::{Event, Events};

/// Where devices send the guest's wish; remembers that there was one.
#[derive(Debug)]
pub(crate) struct PowerSwitch {
    events: Events,
    used: AtomicBool,
}

impl PowerSwitch {
    pub(crate) fn new(events: Events) -> Self {
        Self { events, used: AtomicBool::new(false) }
    }

    /// Whether the guest is past its last instruction that matters: such a guest is not moved.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::SeqCst)
    }

    fn send(&self, event: Event) {
        if !self.used.swap(true, Ordering::SeqCst) {
            self.events.send(event);
        }
    }
}

impl Power for PowerSwitch {
    fn off(&self) {
        self.send(Event::Off);
    }

    fn reset(&self) {
        self.send(Event::Reset);
    }
}
