//! uvmm: a KVM micro-VMM whose one great skill is live migration.

mod arch;
mod block;
mod boot;
pub mod cause;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
mod dirty;
pub mod doctor;
mod event;
mod guest;
mod hotplug;
mod kvm;
pub mod log;
mod machine;
mod memory;
mod migrate;
mod power;
pub mod progress;
mod session;
pub mod signals;
mod snapshot;
mod strategy;
#[doc(hidden)]
pub mod testing;
mod vcpu;
