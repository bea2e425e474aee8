//! Loading a kernel: from files to a vCPU that stands at its entry.

mod kernel;
mod linux;
mod memory_map;
mod pvh;

pub(crate) use kernel::{Entry, Error, load};
