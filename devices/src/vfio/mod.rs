//! Devices of the host that the guest is given, by the kernel's VFIO.
//!
//! The guest reaches the device's memory and the device the guest's, and interrupts arrive, without
//! this process; what it does see is configuration space, in which it keeps back what is not the
//! guest's to know (`patch`), and the table of interrupts.

mod attention;
mod container;
mod error;
mod function;
mod hardware;
mod host;
mod interrupts;
mod listener;
mod patch;
mod regions;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use attention::Owner;
pub use container::{Container, check_container};
pub use error::Error;
pub use function::{FORMAT, Machine, VfioFunction};
pub use host::{HostDevice, IOMMU, Neighbour, Way};
/// KVM's own knowledge of the guest's devices, as [`Container::new`] takes it.
pub use vfio_ioctls::VfioDeviceFd;
