//! What the tests of these devices share: surroundings that remember, and guests that behave badly.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use migration::state::Migratable;
use migration::state::testing::{assert_refuses_junk, load, saved};
use proptest::prelude::*;

use super::Power;
use crate::bus::BusDevice;
use crate::irq::Line;

/// A line that remembers its level and counts its rising edges.
#[derive(Default)]
pub(crate) struct Wire {
    level: AtomicBool,
    edges: AtomicU32,
}

impl Wire {
    pub(crate) fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub(crate) fn edges(&self) -> u32 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl Line for Wire {
    fn set(&self, level: bool) {
        if !self.level.swap(level, Ordering::SeqCst) && level {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Counts what the guest wished for.
#[derive(Default)]
pub(crate) struct Switch {
    off: AtomicU32,
    reset: AtomicU32,
}

impl Switch {
    pub(crate) fn offs(&self) -> u32 {
        self.off.load(Ordering::SeqCst)
    }

    pub(crate) fn resets(&self) -> u32 {
        self.reset.load(Ordering::SeqCst)
    }
}

impl Power for Switch {
    fn off(&self) {
        self.off.fetch_add(1, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) fn wire() -> Arc<Wire> {
    Arc::default()
}

/// Reads one byte.
pub(crate) fn get(device: &impl BusDevice, offset: u64) -> u8 {
    let mut data = [0xff];
    device.read(offset, &mut data);
    data[0]
}

/// One access of any guest.
#[derive(Debug, Clone)]
pub(crate) enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

/// Any accesses within a range of `size` bytes.
pub(crate) fn accesses(size: u64) -> impl Strategy<Value = Vec<Access>> {
    let place = (0..size).prop_flat_map(move |offset| {
        let longest = usize::try_from((size - offset).min(8)).expect("at most 8");
        (Just(offset), 1..=longest)
    });
    let access = (any::<bool>(), place, any::<[u8; 8]>()).prop_map(|(read, place, bytes)| {
        let (offset, length) = place;
        if read {
            Access::Read(offset, length)
        } else {
            Access::Write(offset, bytes[..length].to_vec())
        }
    });
    prop::collection::vec(access, 0..64)
}

/// Lets a bad guest at `device`; then it must survive junk, and `twin` must become its equal.
pub(crate) fn withstands<D: BusDevice + Migratable>(device: &D, twin: &D, accesses: &[Access]) {
    for access in accesses {
        match access {
            Access::Read(offset, length) => device.read(*offset, &mut vec![0xff; *length]),
            Access::Write(offset, data) => device.write(*offset, data),
        }
    }
    let state = saved(device);
    load(twin, &state).expect("what was saved can be loaded");
    assert_eq!(saved(twin), state);
    assert_refuses_junk(device);
}
