//! Both ends in one process: a fake guest, a network that breaks, peers that lie.

mod fake;
mod faults;
mod journeys;
mod network;
mod peers;
mod streams;
mod visitors;
