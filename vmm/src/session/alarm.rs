//! The real-time clock's interrupts: a timer of the host, in the event loop.

use std::io;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::seat::Seat;
use crate::machine::Alarm;

/// Wakes the clock of whatever machine is here when it has something to tell its guest.
pub(super) struct AlarmClock {
    seat: Seat,
    /// Rung when the guest set its clock to another time or alarm.
    alarm: Alarm,
    timer: TimerFd,
}

impl AlarmClock {
    pub(super) fn new(seat: Seat, alarm: Alarm) -> io::Result<Self> {
        Ok(Self { seat, alarm, timer: TimerFd::new()? })
    }

    fn set(&mut self) {
        let set = match self.seat.tick() {
            // A timer of no time is one that is off.
            Some(wait) => self.timer.reset(wait.max(Duration::from_millis(1)), None),
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            tracing::warn!(%error, "the guest's real-time clock will not interrupt");
        }
    }
}

impl MutEventSubscriber for AlarmClock {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = ops
            .add(Events::new(&self.timer, EventSet::IN))
            .and_then(|()| ops.add(Events::new(self.alarm.fd(), EventSet::IN)));
        if let Err(error) = added {
            tracing::warn!(%error, "the guest's real-time clock will not interrupt");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.alarm.settle();
        self.set();
    }
}
