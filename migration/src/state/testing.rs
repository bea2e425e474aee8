//! Checks that every [`Migratable`] can run on itself with one line each.
//!
//! They panic where a check fails and are meant for tests only.

use super::section::{Section, sections};
use super::{Migratable, StateReader, StateWriter};

/// Saves `device`; panics if it cannot.
pub fn saved(device: &impl Migratable) -> Vec<u8> {
    let mut out = StateWriter::new();
    device.save(out.at("test")).expect("a device at rest can be saved");
    out.into_bytes()
}

/// Loads what [`saved`] gave, and insists that `device` took all of it.
pub fn load(device: &impl Migratable, state: &[u8]) -> Result<(), super::StateError> {
    let mut from = StateReader::open(state)?;
    device.load(from.at("test"))?;
    from.finish()
}

/// Asserts that `to` becomes `from`, as far as saving can tell.
///
/// Give two that differ, else the test proves nothing: that is asserted too.
pub fn assert_round_trip(from: &impl Migratable, to: &impl Migratable) {
    let state = saved(from);
    assert_ne!(saved(to), state, "the two devices must differ before the load");
    load(to, &state).expect("a device takes the state of its like");
    assert_eq!(saved(to), state, "saving the copy gives another state");
}

/// Asserts that `device` survives states that nobody saved.
///
/// Each payload is cut, extended and has each of its bits flipped, and each version is changed,
/// under checksums that fit. A load that refuses must leave the device as it was.
pub fn assert_refuses_junk(device: &impl Migratable) {
    let good = saved(device);
    let count = sections(&good).count();
    assert!(count > 0, "the device saves nothing");
    for index in 0..count {
        for junk in variants(&good, index) {
            let before = saved(device);
            if load(device, &junk).is_err() {
                assert_eq!(saved(device), before, "a refused load changed the device");
            }
        }
    }
    load(device, &good).expect("the device still takes its own state");
}

/// Every small damage to section `index` of `state`.
fn variants(state: &[u8], index: usize) -> Vec<Vec<u8>> {
    let section = sections(state).nth(index).expect("counted").expect("just saved");
    let payload = section.payload;
    let flipped = (0..payload.len().min(512) * 8).map(|bit| {
        let mut payload = payload.to_vec();
        payload[bit / 8] ^= 1 << (bit % 8);
        payload
    });
    let cut = (0..payload.len().min(512)).map(|length| payload[..length].to_vec());
    let filled = [0, 0x80, 0xff].map(|byte| vec![byte; payload.len() + 16]);
    let extended = [[payload, &[0]].concat()];
    let payloads = flipped.chain(cut).chain(filled).chain(extended);
    let damaged = payloads.map(|payload| replace(state, index, section.version, &payload));
    let versions = [0, section.version.wrapping_add(1), u16::MAX];
    let other_versions = versions.map(|version| replace(state, index, version, payload));
    damaged.chain(other_versions).collect()
}

/// `state` with the payload and version of section `index` replaced.
fn replace(state: &[u8], index: usize, version: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (i, section) in sections(state).enumerate() {
        let section = section.expect("just saved");
        let section = if i == index { Section { version, payload, ..section } } else { section };
        section.write(&mut out).expect("payloads of tests are small");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::state::{Saved, StateError};

    #[derive(Default)]
    struct Dial {
        position: Cell<u8>,
        careless: bool,
    }

    #[derive(Serialize, Deserialize)]
    struct DialV1 {
        position: u8,
    }

    impl Saved for DialV1 {
        const KIND: &'static str = "dial";
        const VERSION: u16 = 1;
    }

    impl Migratable for Dial {
        fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
            out.put(&DialV1 { position: self.position.get() })
        }

        fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
            let DialV1 { position } = from.take()?;
            if self.careless {
                self.position.set(position);
            }
            if position > 9 {
                return Err(StateError::invalid::<DialV1>("a dial ends at 9"));
            }
            self.position.set(position);
            Ok(())
        }
    }

    #[test]
    fn an_honest_device_passes() {
        let dial = Dial { position: Cell::new(3), careless: false };
        assert_round_trip(&dial, &Dial::default());
        assert_refuses_junk(&dial);
    }

    #[test]
    #[should_panic(expected = "a refused load changed the device")]
    fn a_device_that_changes_before_it_checks_is_caught() {
        assert_refuses_junk(&Dial { position: Cell::new(3), careless: true });
    }
}
