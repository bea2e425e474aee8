//! The PC: x86-64 processors, their interrupt controllers and the tables an OS expects.

pub(crate) mod acpi;
pub(crate) mod clock;
mod count;
pub(crate) mod cpuid;
pub(crate) mod extended;
pub(crate) mod feature;
pub(crate) mod irqchip;
pub(crate) mod layout;
pub(crate) mod model;
pub(crate) mod mptable;
pub(crate) mod msr;
mod pci_aml;
pub(crate) mod profile;
mod promise;
pub(crate) mod regs;
pub(crate) mod testing;
pub(crate) mod vcpu;
