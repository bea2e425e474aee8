//! Interrupt lines into KVM's in-kernel interrupt controllers.

use std::sync::Arc;

use devices::irq::Line;

use super::Vm;

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
}
