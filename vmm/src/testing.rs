//! What uvmm itself reads of what a peer or a file says of a machine, without one: for fuzzing.
//!
//! What KVM makes of a state is KVM's own to check. The states of devices are not read here:
//! devices can be had without a machine.

use migration::state::Saved;
use serde::Serialize;

use crate::{arch, guest, machine};

/// Reads `bytes` as all that they could be; panics where uvmm is wrong.
///
/// That is the state of a vCPU, of the interrupt controllers and of the clocks, the list of the
/// host's devices, and the blueprint in an offer.
pub fn read(bytes: &[u8]) {
    arch::testing::read(bytes);
    decoded::<machine::AssignedV1>(bytes);
    guest::read_blueprint(bytes);
}

/// Reads `bytes` as a `T`; what can be read must read the same when it is written again.
pub(crate) fn decoded<T: Saved>(bytes: &[u8]) -> Option<T> {
    let state = T::decode(T::VERSION, bytes).ok()?;
    let again = encoded(&state);
    let same = T::decode(T::VERSION, &again).map(|state| encoded(&state));
    assert_eq!(same.ok(), Some(again), "what was read differs when it is written and read again");
    Some(state)
}

pub(crate) fn encoded(state: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(state).expect("plain data encodes")
}

#[cfg(test)]
mod tests;
