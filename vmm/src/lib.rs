//! uvmm: a KVM micro-VMM whose one great skill is live migration.

pub mod cause;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod doctor;
pub mod log;
pub mod progress;
pub mod signals;
