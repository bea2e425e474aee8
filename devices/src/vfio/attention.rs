//! What the host has to say of a device while the guest has it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::hardware::{Hardware, Interrupt};
use super::listener::Listener;

/// Who is told what the host has to say of a device. Called on a thread of its own.
pub trait Owner: Send + Sync {
    /// The device had an error that cannot be corrected: it may no longer be what the guest
    /// thinks.
    fn device_failed(&self);
    /// The host wants the device back, as for another driver, and waits until it is given. Told
    /// again and again until then.
    fn device_wanted(&self);
}

/// Listens for whatever of it the device can tell.
pub(super) fn listen_for(hardware: &dyn Hardware, owner: Arc<dyn Owner>) -> io::Result<Listener> {
    let mut heard = Vec::new();
    for kind in [Interrupt::Error, Interrupt::Request] {
        if hardware.interrupts(kind) > 0 {
            let eventfd = EventFd::new(EFD_NONBLOCK)?;
            hardware.signal(kind, 0, &[Some(&eventfd)])?;
            heard.push((kind, eventfd));
        }
    }
    Listener::begin(heard, move |kind| match kind {
        Interrupt::Error => owner.device_failed(),
        _ => owner.device_wanted(),
    })
}
