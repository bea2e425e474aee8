//! The seam to the machine: all that the engine asks of it, on either side.

use std::fs::File;

use crate::compat::{Mismatch, Offer};
use crate::plan::{Meanwhile, Plan, StepFailure};
use crate::policy::Shares;
use crate::ram::{DirtySet, Ram};
use crate::report::Device;
use crate::state::{StateError, StateReader, StateWriter};

/// A guest that leaves.
pub trait Departing {
    /// Finds out how its devices can be moved, and completes the plan. The guest runs on.
    ///
    /// Called first. An error says why the guest cannot leave.
    fn prepare(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure>;

    /// What the peer must be able to take.
    fn offer(&self) -> Offer;

    /// Its memory.
    fn ram(&self) -> &Ram;

    /// Everyone who can write its memory.
    fn dirty(&mut self) -> &mut DirtySet;

    /// Keeps its vCPUs from running for so much of the time from now on; [`Shares::NONE`] lets them
    /// run freely again. Quick, and does nothing to vCPUs that stand still.
    fn throttle(&mut self, shares: &Shares);

    /// How it is brought to a stop, and back. Its steps at [`Priority::VCPUS`] stop the vCPUs, and
    /// run them again when undone.
    ///
    /// [`Priority::VCPUS`]: crate::plan::Priority::VCPUS
    fn plan(&mut self) -> &mut Plan;

    /// Saves everything but its memory, which is not written any more; the clock last.
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError>;

    /// How many bytes `save` will give, about. Part of the expected downtime.
    fn state_size(&self) -> u64;

    /// What became of its assigned devices, for the report.
    fn devices(&self) -> Vec<Device>;

    /// Takes note that the device `id` serves the guest again, at the destination.
    fn is_back(&mut self, id: &str);
}

/// Whoever builds machines for guests that arrive.
pub trait Host {
    /// A machine that waits for its content.
    type Guest: Arriving;

    /// Builds what is offered: allocates memory, creates vCPUs, opens devices.
    ///
    /// Whatever can refuse must do so here. Called again for the next offer where one came to
    /// nothing; the machine of the earlier one is dropped by then. Offers are not trusted.
    ///
    /// Where the memory comes as files, they are of whole pages and together of the size that the
    /// offer tells of, and can never be of another; its ranges are in them one behind the other.
    /// The source has them too, and may run the guest again: until [`Arriving::run`] nobody here may
    /// write to them.
    fn prepare(
        &mut self,
        offer: &Offer,
        memory: Option<Vec<File>>,
    ) -> Result<Self::Guest, Vec<Mismatch>>;
}

/// A guest that arrives. Dropping it before it runs takes the machine down.
pub trait Arriving {
    /// Its memory: zero where the bitmap of the memory tells of no write.
    fn ram(&self) -> &Ram;

    /// Takes over the state. The memory is complete, and may be in use by the source again if the
    /// guest goes back: this may not write to it.
    fn load(&mut self, from: &mut StateReader<'_>) -> Result<(), StateError>;

    /// Lets the guest run. Quick, and the only place where it may start.
    ///
    /// What can fail belongs into `load`. An error here means that no vCPU has run: the guest goes
    /// back to the source.
    fn run(&mut self) -> Result<(), StepFailure>;
}
