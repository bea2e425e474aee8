//! Interrupts as a device sees them.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// One interrupt input of the machine, as its device sees it.
pub trait Line: Send + Sync {
    /// Drives the line: `true` asserts it, until `false`.
    ///
    /// May be called from any thread, also with the level that the line has already, and with the
    /// caller's registers locked: it may neither wait nor call a device.
    fn set(&self, level: bool);

    /// Makes one edge, for inputs that are triggered by edges.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// Opens a way by which an eventfd asserts the line without anybody's help.
    ///
    /// # Errors
    /// When the line has no such way, or the host refuses.
    fn trigger(&self) -> io::Result<Box<dyn LevelTrigger>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An eventfd that asserts a line until the guest's interrupt controller has had it. It is closed,
/// and lets go of the line, when it is dropped.
///
/// The line may be shared: what others do to it counts as well.
pub trait LevelTrigger: Send + Sync {
    /// What to signal to assert the line.
    fn eventfd(&self) -> &EventFd;
    /// Is signalled when the guest ended the interrupt and this trigger let go of the line: who
    /// still wants attention signals [`eventfd`](Self::eventfd) again.
    fn ended(&self) -> &EventFd;
}

/// A message-signalled interrupt: a write of `data` to `address` (PCI 3.0, 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where it is written, which says who is interrupted.
    pub address: u64,
    /// What is written, which says with what vector.
    pub data: u32,
}

/// Where message-signalled interrupts go.
pub trait Messages: Send + Sync {
    /// Sends one now. May be called with registers locked, as [`Line::set`].
    fn send(&self, message: Message);

    /// Opens a way by which an eventfd becomes a message without anybody's help.
    ///
    /// # Errors
    /// When the machine has no more of them, or the host refuses.
    fn vector(&self) -> io::Result<Box<dyn Vector>>;
}

/// An eventfd that becomes a message. It is closed when it is dropped.
pub trait Vector: Send + Sync {
    /// What to signal.
    fn eventfd(&self) -> &EventFd;
    /// What a signal becomes from now on; `None` holds it back.
    ///
    /// # Errors
    /// When the host refuses the route.
    fn route(&self, message: Option<Message>) -> io::Result<()>;
}
