//! Machines without anything in them.

use std::fs::File;

use migration::compat::{Mismatch, Offer, Profile, Rule, agree};
use migration::guest::{Arriving, Departing, Host};
use migration::plan::{Meanwhile, Plan, StepFailure};
use migration::policy::Shares;
use migration::ram::{DirtySet, Ram};
use migration::report::Device;
use migration::state::{StateError, StateReader, StateWriter};
use vm_memory::GuestAddress;

/// Bytes of guest memory.
pub(super) const SIZE: usize = 4 << 12;

pub(super) fn profile() -> Profile {
    Profile::new().with("device", Rule::Eq, "lamp").with("cpus", Rule::AtLeast, 1)
}

pub(super) fn offer() -> Offer {
    let ram = vec![(0, SIZE as u64)];
    Offer { name: "fuzz".into(), config: vec![1], profile: profile(), ram }
}

/// A guest, on either side.
pub(super) struct Guest {
    ram: Ram,
    dirty: DirtySet,
    plan: Plan,
}

impl Guest {
    pub(super) fn new() -> Self {
        let ram = Ram::from_ranges(&[(GuestAddress(0), SIZE)]).expect("a little memory");
        Self { ram, dirty: DirtySet::new(), plan: Plan::new() }
    }
}

impl Departing for Guest {
    fn prepare(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        Ok(())
    }
    fn offer(&self) -> Offer {
        offer()
    }
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn dirty(&mut self) -> &mut DirtySet {
        &mut self.dirty
    }
    fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }
    fn save(&self, _: &mut StateWriter) -> Result<(), StateError> {
        Ok(())
    }
    fn state_size(&self) -> u64 {
        0
    }
    fn devices(&self) -> Vec<Device> {
        Vec::new()
    }
    fn is_back(&mut self, _: &str) {}
    fn throttle(&mut self, _: &Shares) {}
}

impl Arriving for Guest {
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn load(&mut self, _: &mut StateReader<'_>) -> Result<(), StateError> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), StepFailure> {
        panic!("nobody can know the token, and it runs")
    }
}

pub(super) struct Empty;

impl Host for Empty {
    type Guest = Guest;

    fn prepare(&mut self, offer: &Offer, _memory: Option<File>) -> Result<Guest, Vec<Mismatch>> {
        agree(&offer.profile, &profile())?;
        Ok(Guest::new())
    }
}
