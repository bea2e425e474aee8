//! Signals that ask for the end, as part of the event loop.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::low_level::{pipe, unregister};
use signal_hook::{SigId, flag};

/// What ends a VM in an orderly way instead of killing it.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Calls back on the event loop's thread when SIGINT, SIGTERM, SIGHUP or SIGQUIT arrives.
///
/// Until this is dropped, those signals do nothing else.
pub struct Signals {
    pipe: UnixStream,
    latest: Arc<AtomicUsize>,
    registered: Vec<SigId>,
    on_signal: Box<dyn FnMut(i32) + Send>,
}

impl Signals {
    /// Takes the signals over; `on_signal` gets the number of the latest one.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(on_signal: impl FnMut(i32) + Send + 'static) -> io::Result<Self> {
        let (pipe, writer) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let latest = Arc::new(AtomicUsize::new(0));
        let on_signal = Box::new(on_signal);
        let mut signals = Signals { pipe, latest, registered: Vec::new(), on_signal };
        for signal in ENDING {
            // In this order: the number is there when the pipe wakes the loop.
            let number = signal.unsigned_abs() as usize;
            let latest = signals.latest.clone();
            signals.registered.push(flag::register_usize(signal, latest, number)?);
            signals.registered.push(pipe::register(signal, writer.try_clone()?)?);
        }
        Ok(signals)
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.pipe, EventSet::IN)) {
            tracing::error!("signals do not end the VM: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let mut bytes = [0; 64];
        while self.pipe.read(&mut bytes).is_ok_and(|count| count == bytes.len()) {}
        let latest = self.latest.swap(0, Ordering::SeqCst);
        if let Some(&signal) = ENDING.iter().find(|s| s.unsigned_abs() as usize == latest) {
            (self.on_signal)(signal);
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for &id in &self.registered {
            unregister(id);
        }
    }
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::sync::mpsc;

    #[test]
    fn an_ending_signal_becomes_an_event() {
        let (sender, received) = mpsc::channel();
        let signals = Signals::new(move |signal| sender.send(signal).unwrap()).unwrap();
        let mut events = EventManager::<Signals>::new().unwrap();
        events.add_subscriber(signals);
        for signal in [SIGTERM, SIGHUP] {
            signal_hook::low_level::raise(signal).unwrap();
            events.run_with_timeout(5000).unwrap();
            assert_eq!(received.try_recv(), Ok(signal));
        }
    }
}
