//! Devices: registers, guest memory and interrupts-as-traits.
//!
//! Nothing here knows KVM. A device is reached through [`bus::BusDevice`], interrupts through
//! [`irq::Line`], moves with the guest by `migration::state::Migratable`, and asks the machine for
//! anything else through a trait of its own, such as [`legacy::Power`].
//!
//! A device locks its own registers and calls nobody with that lock held but the two that promise
//! not to call back, its [`irq::Line`] and its output: no order of locks can be got wrong.

pub mod bus;
pub mod direct;
pub mod irq;
pub mod legacy;
pub mod pci;
pub mod shpc;
pub mod vfio;
