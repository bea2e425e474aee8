//! What is fuzzed: each function takes any bytes at all, and panics only where uvmm is wrong.
//!
//! `cargo +nightly fuzz run --fuzz-dir vmm/fuzz TARGET` runs one for as long as one likes, and
//! `cargo test -p vmm --test fuzz` all of them for a few seconds, both from what is kept in
//! `vmm/fuzz/corpus`.
//! There `valid-*` is what an honest side says (`keep_what_is_valid` writes it anew; and
//! `keep_what_a_machine_saves`, in `vmm::testing`, what there is of a guest that ran), and `grown-*`
//! the fewest inputs that reached all that libFuzzer had reached when they were put there.
#![allow(dead_code, unused_imports, reason = "each target is one of these")]

mod machines;
mod peers;
mod script;
mod states;
mod valid;

use migration::compat::{Offer, Profile, Rule, agree};
use migration::state::decode_exact;

pub(crate) use peers::{destination, give_to, restored, snapshot, source, take_in};
pub(crate) use states::states;
pub(crate) use vmm::testing::read as machine;

/// Each target with its name, and something valid to begin with.
pub(crate) type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

pub(crate) const TARGETS: [Target; 6] = [
    ("destination", destination, valid::from_a_source),
    ("source", source, valid::from_a_destination),
    ("snapshot", snapshot, valid::snapshots),
    ("offer", offer, offers),
    ("states", states, states::valid),
    ("machine", machine, Vec::new),
];

/// What is offered is compared with what there is, whatever it is.
pub(crate) fn offer(data: &[u8]) {
    let Ok(offer) = decode_exact::<Offer>(data) else { return };
    let have = machines::profile();
    if let Err(mismatches) = agree(&offer.profile, &have) {
        assert!(!mismatches.is_empty());
        for mismatch in mismatches {
            assert!(mismatch.to_string().chars().all(|c| !c.is_control()), "{mismatch}");
        }
    }
    let again = postcard::to_stdvec(&offer).expect("what was decoded encodes");
    let again: Offer = decode_exact(&again).expect("what was encoded decodes");
    assert!(again == offer);
}

fn offers() -> Vec<Vec<u8>> {
    let profile = Profile::new().with("device", Rule::Eq, "radio").with("cpus", Rule::AtLeast, 9);
    let other = Offer { profile, ..machines::offer() };
    [machines::offer(), other].iter().map(|o| postcard::to_stdvec(o).expect("plain")).collect()
}
