//! The migration engine of uvmm: pages, phases and the wire.
#![forbid(unsafe_code)]

mod answering;
pub mod compat;
pub mod destination;
mod error;
pub mod guest;
pub mod handover;
pub mod patience;
pub mod plan;
pub mod policy;
pub mod progress;
pub mod ram;
pub mod record;
pub mod report;
pub mod source;
pub mod state;
#[cfg(test)]
mod trial;
pub mod wire;

pub use answering::Answering;
pub use destination::{Arrived, receive};
pub use error::{Error, Failure, one_line};
pub use source::{Options, send};
