//! A standard hot-plug controller (PCI Standard Hot-Plug Controller and Subsystem 1.0), which a
//! guest's own driver drives: cards come and go with the guest's consent.

mod registers;
mod request;
mod slot;
mod slots;

pub use registers::{Controller, ControllerV1, FIRST_DEVICE, FIRST_NUMBER, SLOTS_MAX};
pub use request::{Progress, Wish};
pub use slot::{Led, State, View};
pub use slots::{SlotError, Slots, Status};
