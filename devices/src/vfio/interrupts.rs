//! From the device's interrupts to the guest's, eventfd by eventfd, without this process.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::hardware::{Hardware, Interrupt};
use super::listener::Listener;
use crate::irq::{LevelTrigger, Line, Message, Messages, Vector};

/// How many vectors are switched on at least, if the device has them: growing means to switch all
/// off for a moment.
const VECTORS_MIN: usize = 8;

/// How a device interrupts the guest at the moment.
enum Mode {
    /// Not at all.
    Off,
    /// By its pin.
    Pin { _wiring: Wiring },
    /// By messages of either kind.
    Messages(Interrupt, Vectors),
}

/// A device's pin on its line. The kernel masks the pin when it interrupts, and it is unmasked when
/// the guest ended that.
struct Wiring {
    /// Unmasks it, if its driver leaves that to us.
    _unmasking: Option<Listener>,
    _trigger: Box<dyn LevelTrigger>,
}

/// The vectors of a device that interrupts by messages.
#[derive(Default)]
struct Vectors {
    /// Those that the guest has used.
    used: Vec<Option<Box<dyn Vector>>>,
    /// How many are switched on in the device.
    on: usize,
}

/// A device's interrupts on their way to the guest.
pub(super) struct Interrupts {
    hardware: Arc<dyn Hardware>,
    messages: Arc<dyn Messages>,
    mode: Mode,
}

impl Interrupts {
    pub(super) fn new(hardware: Arc<dyn Hardware>, messages: Arc<dyn Messages>) -> Self {
        Self { hardware, messages, mode: Mode::Off }
    }

    /// Keeps the device from interrupting.
    pub(super) fn off(&mut self) {
        let kind = match &self.mode {
            Mode::Off => return,
            Mode::Pin { .. } => Interrupt::Intx,
            Mode::Messages(kind, vectors) if vectors.on > 0 => *kind,
            Mode::Messages(..) => {
                self.mode = Mode::Off;
                return;
            }
        };
        // First the device, so that no eventfd is signalled that nobody has.
        if let Err(error) = self.hardware.disable(kind) {
            tracing::warn!(?kind, %error, "cannot switch a device's interrupts off");
        }
        self.mode = Mode::Off;
    }

    /// Lets the device interrupt by `line`, if it has one.
    pub(super) fn pin(&mut self, line: Option<&dyn Line>) {
        if matches!(self.mode, Mode::Pin { .. }) {
            return;
        }
        self.off();
        let Some(line) = line else { return };
        match self.wire(line) {
            Ok(wiring) => self.mode = Mode::Pin { _wiring: wiring },
            Err(error) => tracing::warn!(%error, "a device cannot interrupt by its pin"),
        }
    }

    fn wire(&self, line: &dyn Line) -> io::Result<Wiring> {
        let trigger = line.trigger()?;
        self.hardware.signal(Interrupt::Intx, 0, &[Some(trigger.eventfd())])?;
        let unmasking = match self.hardware.unmask_by(trigger.ended()) {
            Ok(()) => None,
            Err(_) => Some(self.unmask_after(trigger.ended()).inspect_err(|_| {
                // The first error is the one to tell.
                drop(self.hardware.disable(Interrupt::Intx));
            })?),
        };
        Ok(Wiring { _unmasking: unmasking, _trigger: trigger })
    }

    fn unmask_after(&self, ended: &EventFd) -> io::Result<Listener> {
        let hardware = self.hardware.clone();
        Listener::begin(vec![((), ended.try_clone()?)], move |()| {
            if let Err(error) = hardware.unmask() {
                tracing::debug!(%error, "cannot unmask the pin of a device");
            }
        })
    }

    /// Lets the device interrupt by messages of `kind`, of which it has `count`; none is used yet,
    /// unless they were used before.
    pub(super) fn by_messages(&mut self, kind: Interrupt, count: usize) {
        if !matches!(self.mode, Mode::Messages(now, _) if now == kind) {
            self.off();
            let used = std::iter::repeat_with(|| None).take(count).collect();
            self.mode = Mode::Messages(kind, Vectors { used, on: 0 });
        }
    }

    /// What vector `number` becomes from now on; `None` holds it back.
    pub(super) fn route(&mut self, number: u16, message: Option<Message>) {
        let Mode::Messages(kind, vectors) = &mut self.mode else { return };
        let routed = vectors.route(&*self.hardware, &*self.messages, *kind, number.into(), message);
        if let Err(error) = routed {
            tracing::warn!(number, %error, "a device cannot interrupt by one of its vectors");
        }
    }

    /// Whether vector `number` was signalled while it was held back.
    pub(super) fn is_pending(&self, number: u16) -> bool {
        let Mode::Messages(_, vectors) = &self.mode else { return false };
        let vector = vectors.used.get(usize::from(number)).and_then(Option::as_ref);
        vector.is_some_and(|vector| {
            // What is taken out to be looked at goes back: nobody else reads it meanwhile.
            vector.eventfd().read().is_ok_and(|count| vector.eventfd().write(count).is_ok())
        })
    }
}

impl Vectors {
    fn route(
        &mut self,
        hardware: &dyn Hardware,
        messages: &dyn Messages,
        kind: Interrupt,
        number: usize,
        message: Option<Message>,
    ) -> io::Result<()> {
        let Some(slot) = self.used.get_mut(number) else { return Ok(()) };
        match (slot, message) {
            (None, None) => Ok(()),
            (Some(vector), message) => vector.route(message),
            (slot, Some(message)) => {
                let vector = messages.vector()?;
                vector.route(Some(message))?;
                *slot = Some(vector);
                self.switch_on(hardware, kind, number).inspect_err(|_| self.used[number] = None)
            }
        }
    }

    /// Lets the device signal vector `number`, which is used.
    fn switch_on(
        &mut self,
        hardware: &dyn Hardware,
        kind: Interrupt,
        number: usize,
    ) -> io::Result<()> {
        let eventfds: Vec<_> =
            self.used.iter().map(|vector| vector.as_ref().map(|vector| vector.eventfd())).collect();
        if number < self.on {
            let first = u32::try_from(number).map_err(io::Error::other)?;
            return hardware.signal(kind, first, &[eventfds[number]]);
        }
        if self.on > 0 {
            hardware.disable(kind)?;
            self.on = 0;
        }
        let wanted = (number + 1).next_power_of_two().max(VECTORS_MIN).min(eventfds.len());
        // The host may have fewer to give than the device has.
        let result = hardware.signal(kind, 0, &eventfds[..wanted]);
        self.on = match result {
            Ok(()) => wanted,
            Err(_) if wanted > number + 1 => {
                hardware.signal(kind, 0, &eventfds[..=number])?;
                number + 1
            }
            Err(error) => return Err(error),
        };
        Ok(())
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.off();
    }
}
