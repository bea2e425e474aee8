//! The migration engine of uvmm: pages, phases and the wire.

pub mod state;
