//! A machine as the migration engine sees it, on its way out and on its way in.

use std::fmt;
use std::sync::Arc;

use migration::compat::{Mismatch, Offer, Value, agree};
use migration::guest::{Arriving, Departing, Host};
use migration::plan::{Phase, Plan, Priority, Step, StepFailure};
use migration::ram::{DirtySet, OwnWrites, Ram};
use migration::report::Device;
use migration::state::{StateError, StateReader, StateWriter, decode_exact};
use serde::{Deserialize, Serialize};

use crate::arch::profile::{self, TSC_KHZ};
use crate::cause;
use crate::config::{MachineConfig, VmName};
use crate::dirty::KvmLog;
use crate::kvm;
use crate::machine::{HostSide, Machine};
use crate::power::PowerSwitch;
use crate::vcpu::Vcpus;

/// Bytes of state of one vCPU and of everything else, about; extended state can be larger.
const VCPU_BYTES: u64 = 16 << 10;
const DEVICES_BYTES: u64 = 16 << 10;

/// How to build the machine at the other side: what the engine carries without reading it.
#[derive(Debug, Serialize, Deserialize)]
struct Blueprint {
    machine: MachineConfig,
    /// Whether the guest runs once it is there.
    running: bool,
    /// Whether it is the built-in guest, which every uvmm can boot again.
    built_in: bool,
}

/// A machine that leaves.
pub(crate) struct Leaving {
    machine: Machine,
    offer: Offer,
    dirty: DirtySet,
    plan: Plan,
}

impl Leaving {
    /// The guest called `name` on its way out.
    pub(crate) fn new(machine: Machine, name: &VmName, built_in: bool) -> Result<Self, Stays> {
        let profile = match profile::of_machine(machine.vm(), machine.tsc_khz(), None) {
            Ok(profile) => profile,
            Err(error) => return Err(Stays { machine: Box::new(machine), error }),
        };
        let running = machine.is_running();
        let blueprint = Blueprint { machine: machine.config().clone(), running, built_in };
        let ram = machine.vm().ram();
        let offer = Offer {
            name: name.to_string(),
            config: postcard::to_stdvec(&blueprint).expect("plain data encodes"),
            profile,
            ram: regions(ram),
        };
        let mut dirty = DirtySet::new();
        dirty.add(OwnWrites::new(ram.clone()));
        // Last: what the others put into RAM, KVM may see too.
        dirty.add(KvmLog::new(machine.vm().clone()));
        let mut plan = Plan::new();
        let step =
            StopVcpus { vcpus: machine.vcpus().clone(), power: machine.power().clone(), running };
        plan.at(Phase::Quiesce, Priority::VCPUS, step);
        Ok(Self { machine, offer, dirty, plan })
    }

    /// Gives the machine back, as the plan left it.
    pub(crate) fn into_machine(self) -> Machine {
        self.machine
    }
}

/// A machine that cannot leave.
pub(crate) struct Stays {
    pub(crate) machine: Box<Machine>,
    pub(crate) error: kvm::Error,
}

impl Departing for Leaving {
    fn offer(&self) -> Offer {
        self.offer.clone()
    }

    fn ram(&self) -> &Ram {
        self.machine.vm().ram()
    }

    fn dirty(&mut self) -> &mut DirtySet {
        &mut self.dirty
    }

    fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }

    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        self.machine.save(out)
    }

    fn state_size(&self) -> u64 {
        self.machine.vcpus().count() as u64 * VCPU_BYTES + DEVICES_BYTES
    }

    fn devices(&self) -> Vec<Device> {
        Vec::new()
    }
}

/// Stops the vCPUs, and lets them run again if they ran before.
struct StopVcpus {
    vcpus: Arc<Vcpus>,
    power: Arc<PowerSwitch>,
    running: bool,
}

impl Step for StopVcpus {
    fn name(&self) -> String {
        match self.vcpus.count() {
            1 => "stop the vCPU".to_owned(),
            count => format!("stop {count} vCPUs"),
        }
    }

    fn enter(&mut self) -> Result<(), StepFailure> {
        self.vcpus.pause()?;
        if self.power.is_used() {
            // There is nothing to give back: the guest waits for a power supply to go off.
            return Err("the guest has switched itself off or asked for a reset".into());
        }
        Ok(())
    }

    fn undo(&mut self) {
        if self.running
            && let Err(error) = self.vcpus.resume()
        {
            tracing::error!(%error, "cannot let the guest run again");
        }
    }
}

/// Builds machines for guests that arrive.
pub(crate) struct Builder {
    host: HostSide,
}

impl Builder {
    pub(crate) fn new(host: HostSide) -> Self {
        Self { host }
    }
}

/// A machine that waits for its content.
#[derive(Debug)]
pub(crate) struct Awaiting {
    machine: Machine,
    blueprint: Blueprint,
}

impl Awaiting {
    /// The machine with its guest in it, and whether that is the built-in one.
    pub(crate) fn into_machine(self) -> (Machine, bool) {
        (self.machine, self.blueprint.built_in)
    }
}

impl Host for Builder {
    type Guest = Awaiting;

    fn prepare(&mut self, offer: &Offer) -> Result<Awaiting, Vec<Mismatch>> {
        let blueprint: Blueprint = decode_exact(&offer.config)
            .map_err(|error| refusal("machine", "a machine", cause::chain(&error), SAME_UVMM))?;
        let config = &blueprint.machine;
        config.check().and_then(|()| config.check_host(self.host.hugepages)).map_err(|error| {
            refusal("machine", &format!("{config:?}"), cause::chain(&error), CHOOSE_ANOTHER)
        })?;
        let machine = Machine::empty(config, &self.host).map_err(|error| {
            refusal("host", "a new machine", cause::chain(&error), CHOOSE_ANOTHER)
        })?;
        let have = profile::of_machine(machine.vm(), machine.tsc_khz(), guest_tsc_khz(offer))
            .map_err(|error| {
                refusal("host", "its own features", cause::chain(&error), SAME_UVMM)
            })?;
        let ram = regions(machine.vm().ram());
        if ram != offer.ram {
            return Err(refusal(
                "ram",
                &format!("{:x?}", offer.ram),
                format!("{ram:x?}"),
                SAME_UVMM,
            ));
        }
        agree(&offer.profile, &have)?;
        Ok(Awaiting { machine, blueprint })
    }
}

const CHOOSE_ANOTHER: &str = "mend that, or choose another host";
const SAME_UVMM: &str = "use the same uvmm on both sides";

fn refusal(path: &str, wanted: &str, found: String, remedy: &str) -> Vec<Mismatch> {
    vec![Mismatch { path: path.into(), wanted: wanted.into(), found, remedy: remedy.into() }]
}

fn guest_tsc_khz(offer: &Offer) -> Option<u64> {
    offer.profile.items().iter().find(|item| item.path == TSC_KHZ).and_then(|item| {
        match item.value {
            Value::Number(khz) => Some(khz),
            _ => None,
        }
    })
}

impl Arriving for Awaiting {
    fn ram(&self) -> &Ram {
        self.machine.vm().ram()
    }

    fn load(&mut self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        self.machine.load(from)
    }

    fn run(&mut self) -> Result<(), StepFailure> {
        if self.blueprint.running {
            self.machine.resume()?;
        }
        Ok(())
    }
}

fn regions(ram: &Ram) -> Vec<(u64, u64)> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    ram.iter().map(|region| (region.start_addr().0, region.len())).collect()
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").field("machine", &self.machine).finish_non_exhaustive()
    }
}
