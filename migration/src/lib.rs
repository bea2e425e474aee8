//! The migration engine of uvmm: pages, phases and the wire.
#![forbid(unsafe_code)]

pub mod compat;
pub mod guest;
pub mod plan;
pub mod ram;
pub mod report;
pub mod state;
