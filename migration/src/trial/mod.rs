//! Both ends in one process: a fake guest, a network that breaks, peers that lie.

mod asking;
mod bend;
mod devices;
mod disguise;
mod fake;
mod faults;
mod journeys;
mod matrix;
mod network;
mod peers;
mod recorded;
mod restarts;
mod shared;
mod snapshots;
mod sources;
mod streams;
mod versions;
mod visitors;
mod wishes;
