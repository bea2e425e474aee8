//! How the real-time clock asks to be looked at.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Rung by a vCPU when its guest changed what the clock has to do next.
#[derive(Clone, Debug)]
pub(crate) struct Alarm(Arc<EventFd>);

impl Alarm {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK)?)))
    }

    pub(crate) fn ring(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::warn!(%error, "the guest's real-time clock may interrupt late");
        }
    }

    /// What is readable after it was rung.
    pub(crate) fn fd(&self) -> &EventFd {
        &self.0
    }

    /// Forgets that it was rung.
    pub(crate) fn settle(&self) {
        // It may not have been.
        let _ = self.0.read();
    }
}
