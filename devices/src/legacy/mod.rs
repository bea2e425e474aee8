//! What is left of the PC: the few devices that a kernel still expects at fixed ports.

mod calendar;
pub mod i8042;
pub mod pm;
pub mod reset;
pub mod rtc;
pub mod serial;
mod time_format;

#[cfg(test)]
pub(crate) mod testing;

/// What a guest may do to the machine that it runs on.
///
/// Called on the thread of a vCPU, in the middle of its access: note the wish and return.
pub trait Power: Send + Sync {
    /// The guest switched itself off.
    fn off(&self);
    /// The guest wants the machine to start anew.
    fn reset(&self);
}
