//! Keeps the processors of an emulated lab host alive.
//!
//! QEMU loses an interrupt now and then as guests are entered and left, such as that of a
//! processor's timer. The processor then never programs it again, and all that sleeps there sleeps
//! on. So the processor that runs no guests looks after the others: each has a thread that only
//! sleeps for moments, and one whose thread does not wake up is switched off and on again, which
//! moves what sleeps there and begins with a new timer.
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Context, Result, reading, writing};

/// Between two looks.
const PERIOD: Duration = Duration::from_millis(100);
/// How long a thread may not wake up, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(3);
/// The processors that run no guests, where the lab host is emulated; else there are none.
const ISOLATED: &str = "/sys/devices/system/cpu/isolated";
/// Makes the kernel's RCU ask processors instead of waiting for them.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// A processor that runs guests.
struct Processor {
    number: usize,
    /// How often its thread woke up.
    woken: Arc<AtomicU64>,
    seen: u64,
    since: Instant,
}

/// Starts to look after the processors where that is needed.
///
/// # Errors
/// If a thread cannot be started.
pub(super) fn start() -> Result<()> {
    let isolated = fs::read_to_string(ISOLATED).context(|| reading(ISOLATED.as_ref()))?;
    let Ok(own) = isolated.trim().parse::<usize>() else { return Ok(()) };
    let others = sched_getaffinity(None)
        .map_err(std::io::Error::from)
        .context(|| "cannot find out which processors run guests".into())?;
    let others = (0..CpuSet::MAX_CPU).filter(|&number| others.is_set(number));
    let mut processors = others.map(Processor::new).collect::<Result<Vec<_>>>()?;
    // Else the end of a grace period would be told of by the processor that lost its timer.
    fs::write(EXPEDITED, "1").context(|| writing(EXPEDITED.as_ref()))?;
    for thread in kernel_threads() {
        stay_on(Some(thread), own);
    }
    spawn("heart".into(), move || {
        loop {
            stay_on(None, own);
            thread::sleep(PERIOD);
            processors.iter_mut().for_each(Processor::look);
        }
    })
}

impl Processor {
    fn new(number: usize) -> Result<Self> {
        let woken = Arc::<AtomicU64>::default();
        let wakes = woken.clone();
        spawn(format!("pulse-{number}"), move || {
            let _ = setpriority_process(None, -20);
            loop {
                // It was moved if the processor was switched off.
                stay_on(None, number);
                thread::sleep(PERIOD);
                wakes.fetch_add(1, Ordering::Relaxed);
            }
        })?;
        Ok(Self { number, woken, seen: 0, since: Instant::now() })
    }

    fn look(&mut self) {
        let woken = self.woken.load(Ordering::Relaxed);
        if woken != self.seen {
            (self.seen, self.since) = (woken, Instant::now());
        } else if self.since.elapsed() > PATIENCE {
            self.restart();
            self.since = Instant::now();
        }
    }

    fn restart(&self) {
        let switch = format!("/sys/devices/system/cpu/cpu{}/online", self.number);
        let outcome = fs::write(&switch, "0").and_then(|()| fs::write(&switch, "1"));
        let said = format!("lab: processor {} lost its timer: {outcome:?}\n", self.number);
        let _ = fs::write("/dev/kmsg", said);
    }
}

/// The kernel's threads that switching a processor off waits for: they must not sleep there.
fn kernel_threads() -> Vec<Pid> {
    let waited_for = |pid: &Pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("rcu")
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Pid::from_raw).filter(waited_for).collect()
}

/// Keeps a thread, or this one, on a processor. Where that cannot be, it stays where it was.
fn stay_on(thread: Option<Pid>, processor: usize) {
    let mut only = CpuSet::new();
    only.set(processor);
    let _ = sched_setaffinity(thread, &only);
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let cannot = || "cannot start a thread that looks after a processor".into();
    thread::Builder::new().name(name).spawn(work).map(drop).context(cannot)
}
