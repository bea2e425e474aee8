//! What the host has to say of a device while the guest has it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::hardware::{Hardware, Interrupt};

/// Who is told what the host has to say of a device. Called on a thread of its own.
pub trait Owner: Send + Sync {
    /// The device had an error that cannot be corrected: it may no longer be what the guest
    /// thinks.
    fn device_failed(&self);
    /// The host wants the device back, as for another driver, and waits until it is given. Told
    /// again and again until then.
    fn device_wanted(&self);
}

/// Listens for a device while it exists.
pub(super) struct Attention {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Attention {
    /// Listens for whatever of it the device can tell.
    pub(super) fn begin(hardware: &dyn Hardware, owner: Arc<dyn Owner>) -> io::Result<Self> {
        let mut heard = Vec::new();
        for kind in [Interrupt::Error, Interrupt::Request] {
            if hardware.interrupts(kind) > 0 {
                let eventfd = EventFd::new(EFD_NONBLOCK)?;
                hardware.signal(kind, 0, &[Some(&eventfd)])?;
                heard.push((kind, eventfd));
            }
        }
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        for eventfd in heard.iter().map(|(_, eventfd)| eventfd).chain([&*stop]) {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)?;
        }
        let until = stop.clone();
        let listen = move || listen(&epoll, &heard, &until, &*owner);
        let thread = thread::Builder::new().name("vfio".into()).spawn(listen)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn listen(epoll: &Epoll, heard: &[(Interrupt, EventFd)], stop: &EventFd, owner: &dyn Owner) {
    loop {
        match epoll.wait(-1, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return tracing::error!(%error, "cannot listen for a device"),
            Ok(_) => {}
        }
        // Whatever else there is: a device that is on its way out is nobody's.
        if stop.read().is_ok() {
            return;
        }
        for (kind, eventfd) in heard {
            match kind {
                _ if eventfd.read().is_err() => {}
                Interrupt::Error => owner.device_failed(),
                _ => owner.device_wanted(),
            }
        }
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            return tracing::error!(%error, "cannot stop listening for a device");
        }
        let Some(thread) = self.thread.take() else { return };
        // The owner may have dropped the device from within a call.
        if thread.thread().id() != thread::current().id() {
            drop(thread.join());
        }
    }
}
