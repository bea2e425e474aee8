//! A guest as a file: the source's half of a migration, written down.
//!
//! ```text
//! HELLO, OFFER, all memory, STATE, END(totals)        and nothing behind it
//! ```
//!
//! The frames are those of a migration, so whatever a destination checks is checked here too. Pages
//! that are zero are only told of, which keeps the file small; all others carry a checksum, since
//! a file is kept for longer than a connection.
//!
//! A file cannot be asked who has the guest, so it takes no part in a hand-over: there is no token,
//! no COMMIT, and nothing is written down. What the source promises is only that the guest stands
//! still while it is written, and that the file is there before the guest goes on, or ends. What is
//! restored is a **copy**. It runs once all of it was checked, and as often as someone restores it,
//! beside the guest that it was taken of and beside other copies: who wants only one of them to run
//! sees to that.

mod damage;
mod restore;
mod save;

pub use damage::Damage;
pub use restore::restore;
pub use save::{Afterwards, save};
