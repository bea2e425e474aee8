//! Machines without anything in them.

use std::fs::File;

use migration::compat::{Mismatch, Offer, Profile, Rule, agree};
use migration::guest::{Arriving, Departing, Host};
use migration::plan::{Meanwhile, Plan, StepFailure};
use migration::policy::Shares;
use migration::ram::{DirtySet, Ram};
use migration::report::Device;
use migration::state::{StateError, StateReader, StateWriter};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

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
    /// How often it was let run after it arrived.
    pub(super) runs: u32,
}

impl Guest {
    /// In the memory that is given, or else in its own.
    pub(super) fn new(given: Option<Vec<File>>) -> Self {
        let mut start = 0;
        let regions = given.unwrap_or_else(|| vec![memory()]).into_iter().map(|file| {
            let bytes = file.metadata().expect("a file").len();
            let len = usize::try_from(bytes).expect("a little memory");
            let region = (GuestAddress(start), len, Some(FileOffset::new(file, 0)));
            start += bytes;
            region
        });
        let ram = Ram::from_ranges_with_files(regions.collect::<Vec<_>>());
        let ram = ram.expect("a little memory");
        Self { ram, dirty: DirtySet::new(), plan: Plan::new(), runs: 0 }
    }
}

/// The file that is a guest's memory.
pub(super) fn memory() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest", flags).expect("a little memory"));
    file.set_len(SIZE as u64).expect("it is a file");
    let sealed = fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
    sealed.expect("it can be sealed");
    file
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
        self.runs += 1;
        Ok(())
    }
}

pub(super) struct Empty;

impl Host for Empty {
    type Guest = Guest;

    fn prepare(
        &mut self,
        offer: &Offer,
        memory: Option<Vec<File>>,
    ) -> Result<Guest, Vec<Mismatch>> {
        agree(&offer.profile, &profile())?;
        Ok(Guest::new(memory))
    }
}
