//! The migration engine of uvmm: pages, phases and the wire.
//!
//! It moves a running guest from one process to another so that the guest never runs twice and is
//! never lost to a fault. It knows nothing of KVM, PCI or devices: a machine that wants to leave
//! is a [`guest::Departing`], one that builds machines for others a [`guest::Host`]. Two functions
//! do the work, and each reads from top to bottom: [`send`] and [`receive`].
//!
//! ```text
//!        source                                             destination
//!
//!   connect   HELLO ──────────────────────────────────────►
//!                   ◄────────────────────────────────────── HELLO           which version
//!     agree   OFFER ──────────────────────────────────────► build the machine, open devices
//!                   ◄───────────────────────── ACCEPTED(token)  or  MISMATCHED(everything)
//!             (a dry run ends here)                         (waits for another connection)
//!     widen   HELLO, JOIN(token, lane) ─────────────────────► for each connection more
//!                   ◄────────────────────────────────────── JOINED
//!   precopy   dirty logs start, plan: Precopy
//!             all memory ─────────────────────────────────► into memory
//!             ROUND END ──────────────────────────────────►
//!                   ◄────────────────────────────────────── ROUND TAKEN
//!             what was dirty ─────────────────────────────► again and again, until little is left
//!   quiesce   plan: Quiesce               ┐
//!             collect, the last memory ───┼───────────────►
//!             STATE ──────────────────────┼───────────────► count, check, load
//!             nothing dirty since         │
//!             END(totals) ────────────────┼───────────────►
//!                   ◄─────────────────────┼──────────────── READY(token)    from here: answering
//!                                         │                written down: ready, before READY
//!    commit   written down: asked         │ downtime
//!             COMMIT(token) ──────────────┼───────────────► written down: running; run
//!                   ◄─────────────────────┴──────────────── RUNNING(token)  or  ANSWER(refused)
//!             written down: given
//!             DONE(token) ────────────────────────────────► answering ends, all is forgotten
//!    settle         ◄────────────────────────────────────── BACK(device) for each, SETTLED
//! ```
//!
//! ANSWER comes where a destination that was ready does not run the guest after all: it lost
//! patience, was asked by another connection, or could not start a vCPU. BACK tells that an assigned
//! device serves the guest again, and SETTLED that no more will: only the report depends on them.
//! ALIVE, from the source, may come wherever memory or END could: it waits for its guest then, which
//! lets go of a device or prepares to, and has nothing else to say.
//!
//! Memory flows over all connections of a migration, as OFFER agreed on their number: each carries
//! frames of pages until its own ROUND END, and after the last pass its own END(totals). ROUND TAKEN
//! answers only once the pass has ended on all of them, so what a later pass brings is never
//! overtaken by an earlier one. Whichever connection breaks ends the migration.
//!
//! Before COMMIT may have left, whatever fails at either side undoes the plan, and the guest runs
//! on at the source. Afterwards only the destination knows: if RUNNING does not come, the source
//! connects again.
//!
//! ```text
//!       ask   HELLO, QUERY(token) ────────────────────────► ready? written down: dead
//!                   ◄──────────────────── ANSWER(running | refused | unknown)
//!             written down: given, back
//!             DONE(token) ────────────────────────────────► answering ends, all is forgotten
//! ```
//!
//! *Running* ends the migration, *refused* gives the guest back to the source: a destination that
//! is asked before it got COMMIT binds itself never to run. If nobody answers in time the
//! migration ends as [`Error::Undecided`], the guest stopped. The decision is two small machines
//! without any I/O, in [`handover`], with a table of the states of both sides; a test explores
//! them completely.
//!
//! Either process may be gone by the time when it is asked or would ask. What is written down, in a
//! [`record`], is what a later one goes by: a destination that is started again with the records of
//! the one before it answers for that one, and whoever finds that a guest was given away here calls
//! [`ask`] before it boots that guest again.
//!
//! # Versions
//!
//! HELLO is frozen: a magic number, and the oldest and the newest version that its sender speaks.
//! Both sides go by the newest version that both speak; if there is none they say so, each with
//! both ranges, and nothing has happened. Version 2 is version 1 with memory that may come packed
//! ([`wire::Compression`]): to a peer of version 1 memory goes as it is.
//!
//! Three things can differ between builds, and each has its rule:
//! - Frames and messages: whatever changes them is a new version ([`wire::VERSIONS`]), used only
//!   where both speak it. Messages are numbered by their place in [`wire::Message`]: new ones go to
//!   the end.
//! - What a machine is like: its profile and how to build it, in OFFER. The destination refuses what
//!   it does not know, by its name; so what is new is left out where it is as it always was.
//! - The state of each part ([`state::Saved`]): its version is in the profile ([`state::Format`]), and
//!   the destination refuses one that it cannot read.
//!
//! So a guest moves to a newer build as long as that keeps the older protocol in its range, reads the
//! older formats, and knows what older machines are like; what was recorded of older builds is kept
//! with the tests, and read by each later one. It moves to an older build if nothing about it is new:
//! neither a device, nor a format, nor a property. Otherwise it is refused, by everything that is in
//! the way and before the first dirty log starts, and runs on at the source.
//!
//! # On one host
//!
//! ```text
//!     share   SHARE ──────────────────────────────────────► after HELLO, over a Unix socket
//!                   ◄────────────────────────────────────── PASS
//!             one byte, and the files of the memory ──► check their size and seals, map them
//!             OFFER and so on; no memory flows, and STATE is the first to come
//! ```
//!
//! Then both sides have the same memory mapped, and the rules of the hand-over are what they are.
//! Since the source may run the guest again until COMMIT has left, the destination writes nothing
//! to memory before it runs the guest: not even what loading a state may have a hypervisor write.
//! No dirty log runs, as nothing can be missed. Once a guest is *undecided* whoever runs it at both
//! sides has two of them in one memory, which neither survives.
//!
//! # Into a file
//!
//! The source's half alone, written down, is a snapshot: see [`snapshot`], and what becomes of the
//! rules of the hand-over where there is nobody to ask.
//!
//! # Trust
//!
//! Nothing is encrypted, and neither side proves who it is: whoever can reach a destination can offer
//! it a guest, and whoever can read the wire reads the guest's memory. That is for the network to
//! prevent.
//!
//! Either side may end it with GAVE UP and a reason. Every wait is bounded by [`patience`]; whoever
//! connects and says nothing keeps nobody else waiting. What a
//! peer sends is not trusted: lengths are checked before they are believed, addresses before they
//! are used, texts before they are printed. Messages carry a checksum, since one wrong bit could
//! turn one answer into the other; the headers of memory and all state are summed up in END, and
//! each frame of memory carries a sum of its content if that is wished. What is packed unpacks to
//! the size that its header tells, or not at all.
//!
//! The same on one page, with every message: `docs/protocol.md`. What is on the wire: [`wire`]. How
//! state becomes bytes: [`state`]. Which pages to send: [`ram`]. What two machines must have in
//! common: [`compat`]. Who does what when, and how it is taken back: [`plan`]. When to stop copying:
//! [`policy`].
#![forbid(unsafe_code)]

mod answering;
mod asking;
pub mod compat;
mod destination;
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
pub mod snapshot;
mod source;
pub mod state;
#[cfg(test)]
mod trial;
pub mod wire;

pub use answering::Answering;
pub use asking::ask;
pub use destination::{Arrived, Homecoming, receive};
pub use error::{Error, Failure, one_line};
pub use source::{Options, send};
