//! One descriptor in the event loop, for as long as there is something to wait for.

use std::os::fd::{AsRawFd, RawFd};

use event_manager::{Error, EventOps, EventSet, Events};
use vmm_sys_util::eventfd::EventFd;

/// Which descriptor is watched, and for what.
///
/// A descriptor that nothing is wanted from is not watched at all, since epoll would report its
/// closing over and over.
#[derive(Debug, Default)]
pub(super) struct Watch {
    current: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    /// What is meant.
    fd: RawFd,
    /// Stands in for a regular file, which is always ready and so cannot be in an epoll.
    stand_in: Option<EventFd>,
    set: EventSet,
}

impl Watched {
    fn events(&self, set: EventSet) -> Events {
        let fd = self.stand_in.as_ref().map_or(self.fd, AsRawFd::as_raw_fd);
        Events::new_raw(fd, set)
    }
}

impl Watch {
    /// Whether an event on `fd` is about what is watched.
    pub(super) fn is_for(&self, fd: RawFd) -> bool {
        self.current.as_ref().is_some_and(|w| w.events(w.set).fd() == fd)
    }

    /// Watches this from now on; nothing, when there is no descriptor or the set is empty.
    ///
    /// The descriptor that was watched until now must still be open.
    pub(super) fn set(&mut self, ops: &mut EventOps<'_>, fd: Option<RawFd>, set: EventSet) {
        let wanted = fd.filter(|_| !set.is_empty());
        if let Some(watched) = &mut self.current {
            if wanted == Some(watched.fd) {
                if watched.set != set {
                    watched.set = set;
                    report(ops.modify(watched.events(set)));
                }
                return;
            }
            report(ops.remove(watched.events(EventSet::empty())));
            self.current = None;
        }
        let Some(fd) = wanted else { return };
        let mut watched = Watched { fd, stand_in: None, set };
        match ops.add(watched.events(set)) {
            Err(Error::Epoll(error)) if error.errno() == libc::EPERM => {
                match EventFd::new(libc::EFD_CLOEXEC) {
                    Ok(ready) => {
                        report(ready.write(1));
                        watched.stand_in = Some(ready);
                        report(ops.add(watched.events(set)));
                    }
                    Err(error) => report(Err(error)),
                }
            }
            added => report(added),
        }
        self.current = Some(watched);
    }
}

fn report<E: std::fmt::Display>(outcome: Result<(), E>) {
    if let Err(error) = outcome {
        tracing::error!("cannot watch the serial line: {error}");
    }
}
