//! Keeps the timers of an emulated lab host's processors going.
//!
//! QEMU loses an interrupt now and then, such as that of a processor's timer. Linux does not set the
//! timer again before the event has come that it is set for, and so all that sleeps there sleeps on;
//! but an event that is due before all others is a reason to set it. So each processor has a thread
//! that gives itself such an event whenever it wakes up, and wakes the threads of the others, which
//! needs no timer of theirs. It also repeats an interrupt that its processor never heard of.
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::{self, Builder, Thread};
use std::time::{Duration, Instant};

use rustix::io::Result as Outcome;
use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::apic::LocalApic;
use crate::error::{Context, Result, reading};

const PERIOD: Duration = Duration::from_millis(100);
/// The processors that run no guests, where the lab host is emulated; else there are none.
const ISOLATED: &str = "/sys/devices/system/cpu/isolated";

/// Starts to look after the timers where that is needed.
///
/// # Errors
/// If a thread cannot be started.
pub(super) fn start() -> Result<()> {
    let isolated = fs::read_to_string(ISOLATED).context(|| reading(ISOLATED.as_ref()))?;
    let Ok(isolated) = isolated.trim().parse() else { return Ok(()) };
    let cannot = || "cannot look after the processors' timers".into();
    let mut processors = sched_getaffinity(None).map_err(std::io::Error::from).context(cannot)?;
    processors.set(isolated);
    let all = Arc::<OnceLock<Vec<Thread>>>::default();
    let start = |processor: usize| {
        let (others, timer) = (all.clone(), new_timer()?);
        let beat = move || beat(processor, &timer, &others);
        let thread = Builder::new().name(format!("heart-{processor}")).spawn(beat)?;
        Ok(thread.thread().clone())
    };
    let numbers = (0..CpuSet::MAX_CPU).filter(|&number| processors.is_set(number));
    let threads = numbers.map(start).collect::<std::io::Result<_>>().context(cannot)?;
    all.get_or_init(|| threads);
    Ok(())
}

fn beat(processor: usize, timer: &OwnedFd, all: &OnceLock<Vec<Thread>>) {
    let mut only = CpuSet::new();
    only.set(processor);
    // A processor without a timer lets nobody else run who is not clearly more important.
    let _as_usual = setpriority_process(None, -20);
    let apic = LocalApic::map();
    if let Err(error) = &apic {
        note(&format!("interrupts of processor {processor} are not looked after: {error}"));
    }
    let mut since = Instant::now();
    loop {
        thread::park_timeout(PERIOD.saturating_sub(since.elapsed()));
        // Elsewhere if the processor is gone, or for as long as another says so.
        let _elsewhere = sched_setaffinity(None, &only);
        if let Some(vector) = apic.iter().find_map(LocalApic::repeat_what_nobody_serves) {
            note(&format!("processor {processor} never heard of its interrupt {vector}"));
        }
        let _left_as_it_is = make_an_event_due(timer);
        // Whoever was woken by another wakes nobody.
        if since.elapsed() >= PERIOD {
            all.get().into_iter().flatten().for_each(Thread::unpark);
        }
        since = Instant::now();
    }
}

/// Says it in the kernel's log, which is kept.
fn note(text: &str) {
    let _where_there_is_one = fs::write("/dev/kmsg", format!("lab: {text}\n"));
}

fn new_timer() -> Outcome<OwnedFd> {
    timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)
}

/// Sets the timer for the moment at which the clock began.
fn make_an_event_due(timer: &OwnedFd) -> Outcome<()> {
    let it_value = Timespec { tv_sec: 0, tv_nsec: 1 };
    let once = Itimerspec { it_interval: Timespec::default(), it_value };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &once).map(drop)
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn an_event_is_due_at_once_each_time() {
        let timer = new_timer().unwrap();
        for _ in 0..3 {
            make_an_event_due(&timer).unwrap();
            let moment = Timespec { tv_sec: 5, tv_nsec: 0 };
            let due = poll(&mut [PollFd::new(&timer, PollFlags::IN)], Some(&moment)).unwrap();
            assert_eq!(due, 1);
        }
    }
}
