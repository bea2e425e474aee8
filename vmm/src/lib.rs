//! uvmm: a KVM micro-VMM whose one great skill is live migration.

pub mod cause;
pub mod config;
pub mod console;
pub mod control;
pub mod signals;
