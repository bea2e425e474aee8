//! Interrupt lines into KVM's in-kernel interrupt controllers.

use std::io;
use std::sync::Arc;

use devices::irq::{LevelTrigger, Line};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Vm;
use super::routes::into_io;

/// One global system interrupt of a machine.
pub(crate) struct IrqLine {
    vm: Arc<Vm>,
    gsi: u32,
}

impl IrqLine {
    pub(crate) fn new(vm: Arc<Vm>, gsi: u32) -> Arc<Self> {
        Arc::new(Self { vm, gsi })
    }
}

impl Line for IrqLine {
    fn set(&self, level: bool) {
        if let Err(error) = self.vm.fd().set_irq_line(self.gsi, level) {
            tracing::error!(gsi = self.gsi, level, %error, "KVM_IRQ_LINE");
        }
    }

    fn trigger(&self) -> io::Result<Box<dyn LevelTrigger>> {
        let [eventfd, ended] = [EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?];
        self.vm.fd().register_irqfd_with_resample(&eventfd, &ended, self.gsi).map_err(into_io)?;
        Ok(Box::new(LineTrigger { vm: self.vm.clone(), gsi: self.gsi, eventfd, ended }))
    }
}

/// An eventfd that KVM asserts a line by, with a voice of its own beside [`IrqLine`]'s.
struct LineTrigger {
    vm: Arc<Vm>,
    gsi: u32,
    eventfd: EventFd,
    ended: EventFd,
}

impl LevelTrigger for LineTrigger {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn ended(&self) -> &EventFd {
        &self.ended
    }
}

impl Drop for LineTrigger {
    fn drop(&mut self) {
        if let Err(error) = self.vm.fd().unregister_irqfd(&self.eventfd, self.gsi) {
            tracing::error!(gsi = self.gsi, %error, "KVM_IRQFD");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DirtyTracking;
    use crate::memory;

    #[test]
    fn a_line_can_have_more_than_one_trigger_and_loses_them_again() {
        let vm = match Vm::new(memory::allocate(64 << 20, None).unwrap(), DirtyTracking::default())
        {
            Ok(vm) => Arc::new(vm),
            Err(error) => return eprintln!("skipped: no usable KVM: {error}"),
        };
        let line = IrqLine::new(vm.clone(), 16);
        let triggers = [line.trigger().unwrap(), line.trigger().unwrap()];
        triggers[0].eventfd().write(1).unwrap();
        assert!(triggers[0].ended().read().is_err(), "the guest has not had it yet");
        drop(triggers);
        drop(line);
        assert_eq!(Arc::strong_count(&vm), 1);
    }
}
