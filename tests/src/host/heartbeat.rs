//! Keeps the processors of an emulated lab host awake.
//!
//! As a guest is entered, QEMU changes the word of pending interrupts without its lock
//! (`helper_vmrun`): an interrupt that comes at that moment may be lost. If it was the timer's, the
//! processor never programs it again, and all that sleeps there sleeps on. Another interrupt makes
//! up for it, so the processor that runs no guests sends one to each of the others now and then.
use std::fs;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Context, Result, reading};

/// How long a processor may lie lame.
const PERIOD: Duration = Duration::from_millis(50);
/// The processors that run no guests, where the lab host is emulated; else there are none.
const ISOLATED: &str = "/sys/devices/system/cpu/isolated";

/// Starts the heartbeat where it is needed.
///
/// # Errors
/// If a thread cannot be started where it belongs.
pub(super) fn start() -> Result<()> {
    let isolated = fs::read_to_string(ISOLATED).context(|| reading(ISOLATED.as_ref()))?;
    let Ok(heart) = isolated.trim().parse::<usize>() else { return Ok(()) };
    let others = sched_getaffinity(None)
        .map_err(std::io::Error::from)
        .context(|| "cannot find out which processors run guests".into())?;
    let others = (0..CpuSet::MAX_CPU).filter(|&number| others.is_set(number));
    let beats = others.map(listen).collect::<Result<Vec<_>>>()?;
    on_processor(heart, "heart".into(), move || {
        while beats.iter().all(|beat| beat.send(()).is_ok()) {
            thread::sleep(PERIOD);
        }
    })
}

/// A thread of processor `number` that each message wakes: there is an interrupt in that.
fn listen(number: usize) -> Result<Sender<()>> {
    let (sender, receiver): (_, Receiver<()>) = mpsc::channel();
    on_processor(number, format!("pulse-{number}"), move || while receiver.recv().is_ok() {})?;
    Ok(sender)
}

/// Runs `work` on a thread that no other processor runs, and that preempts others.
fn on_processor(number: usize, name: String, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let cannot = || format!("cannot start a thread on processor {number}");
    let mut only = CpuSet::new();
    only.set(number);
    let (sender, placed) = mpsc::channel();
    let run = move || {
        let place = sched_setaffinity(None, &only).and_then(|()| setpriority_process(None, -20));
        let failed = place.is_err();
        if sender.send(place).is_ok() && !failed {
            work();
        }
    };
    thread::Builder::new().name(name).spawn(run).context(cannot)?;
    placed.recv().unwrap_or(Ok(())).map_err(std::io::Error::from).context(cannot)
}
