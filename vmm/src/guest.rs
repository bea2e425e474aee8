//! A machine as the migration engine sees it, on its way out and on its way in.

mod arriving;
mod leaving;

use devices::pci::identity::Identity;
use migration::compat::{Profile, Rule};
use migration::ram::Ram;
use serde::{Deserialize, Serialize};

pub(crate) use arriving::{Awaiting, Builder, Settler};
pub(crate) use leaving::{Leaving, Stays, Traits};

use crate::config::{DeviceId, MachineConfig};

/// How to build the machine at the other side: what the engine carries without reading it.
#[derive(Debug, Serialize, Deserialize)]
struct Blueprint {
    machine: MachineConfig,
    /// Whether the guest runs once it is there.
    running: bool,
    /// Whether it is the built-in guest, which every uvmm can boot again.
    built_in: bool,
    /// Whether it was told to bounce all DMA.
    bounces: bool,
    /// The host's devices that it has: the destination brings one of its own for each.
    devices: Vec<Passenger>,
}

/// A device that the guest has at the source.
#[derive(Debug, Serialize, Deserialize)]
struct Passenger {
    id: DeviceId,
    slot: u8,
}

/// What the paths of the host's devices begin with in a profile.
const DEVICES: &str = "device/";

/// Where a profile tells of the device `id`.
fn device_path(id: &DeviceId) -> String {
    format!("{DEVICES}{id}")
}

/// Adds to `profile` what the device `id` looks like to its driver.
fn with_device(profile: Profile, id: &DeviceId, rule: Rule, identity: &Identity) -> Profile {
    let path = device_path(id);
    let Identity { model, bars, interrupts, capabilities } = identity;
    profile
        .with(format!("{path}/model"), rule, model.as_str())
        .with(format!("{path}/bars"), rule, bars.as_str())
        .with(format!("{path}/interrupts"), rule, interrupts.as_str())
        .with(format!("{path}/capabilities"), rule, capabilities.as_str())
}

fn regions(ram: &Ram) -> Vec<(u64, u64)> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    ram.iter().map(|region| (region.start_addr().0, region.len())).collect()
}
