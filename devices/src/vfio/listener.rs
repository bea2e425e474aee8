//! Eventfds that are listened to on a thread of its own.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Listens while it exists.
pub(super) struct Listener {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Calls `on` with what belongs to each of `heard` that is signalled, on another thread. They
    /// must not block.
    pub(super) fn begin<T: Send + 'static>(
        heard: Vec<(T, EventFd)>,
        on: impl Fn(&T) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        for eventfd in heard.iter().map(|(_, eventfd)| eventfd).chain([&*stop]) {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)?;
        }
        let until = stop.clone();
        let listen = move || listen(&epoll, &heard, &until, on);
        let thread = thread::Builder::new().name("vfio".into()).spawn(listen)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn listen<T>(epoll: &Epoll, heard: &[(T, EventFd)], stop: &EventFd, on: impl Fn(&T)) {
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
        for (what, eventfd) in heard {
            if eventfd.read().is_ok() {
                on(what);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            return tracing::error!(%error, "cannot stop listening for a device");
        }
        let Some(thread) = self.thread.take() else { return };
        // It may have been dropped from within a call.
        if thread.thread().id() != thread::current().id() {
            drop(thread.join());
        }
    }
}
