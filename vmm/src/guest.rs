//! A machine as the migration engine sees it, on its way out and on its way in.

mod arriving;
mod leaving;

use devices::pci::identity::Identity;
use migration::compat::{Profile, Rule};
use serde::{Deserialize, Serialize};

pub(crate) use arriving::{Awaiting, Builder, Runs, Settler};
pub(crate) use leaving::{Leaving, Stays, Traits};

use crate::config::{DeviceId, MachineConfig};

/// How to build the machine at the other side: what the engine carries without reading it.
///
/// It is JSON, so that builds of different ages understand each other. A field that is new is left
/// out where it has the value that builds without it take for granted (`default` and
/// `skip_serializing_if`): they can build that machine. Where it has another value they refuse it by
/// its name, as they refuse any that they do not know. The same is true of everything in it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Passenger {
    id: DeviceId,
    slot: u8,
}

impl Blueprint {
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data encodes")
    }

    fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// Reads `bytes` as a blueprint; panics if what can be read differs when it is written again.
pub(crate) fn read_blueprint(bytes: &[u8]) {
    let Ok(blueprint) = Blueprint::decode(bytes) else { return };
    let again = Blueprint::decode(&blueprint.encode()).expect("what was written can be read");
    assert!(again == blueprint, "it became another: {blueprint:?}, {again:?}");
    let _may_not_fit = blueprint.machine.check();
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::CpuModel;

    /// What the first build wrote.
    const FIRST: &str = concat!(
        r#"{"machine":{"memory":536870912,"cpus":2,"pci_slots":4,"#,
        r#""cpu":{"base":"x86-64-v3","add":["aes"],"remove":[]}},"#,
        r#""running":true,"built_in":false,"bounces":true,"#,
        r#""devices":[{"id":"net0","slot":1}]}"#,
    );

    fn first() -> Blueprint {
        let cpu: CpuModel = serde_json::from_str(r#"{"base":"x86-64-v3","add":["aes"]}"#).unwrap();
        let machine = MachineConfig { memory: 512 << 20, cpus: 2, pci_slots: 4, cpu };
        let devices = vec![Passenger { id: "net0".parse().unwrap(), slot: 1 }];
        Blueprint { machine, running: true, built_in: false, bounces: true, devices }
    }

    #[test]
    fn what_any_build_ever_wrote_is_read() {
        assert_eq!(Blueprint::decode(FIRST.as_bytes()).unwrap(), first());
    }

    #[test]
    fn a_machine_that_the_first_build_could_make_is_written_so_that_it_can() {
        assert_eq!(String::from_utf8(first().encode()).unwrap(), FIRST);
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_make_the_decoder_panic(
            junk: Vec<u8>,
            at in 0..FIRST.len(),
            cut in 0..8usize,
        ) {
            read_blueprint(&junk);
            let mut bytes = FIRST.as_bytes().to_vec();
            bytes.splice(at..FIRST.len().min(at + cut), junk);
            read_blueprint(&bytes);
        }
    }

    #[test]
    fn what_is_not_known_of_a_machine_is_refused_by_its_name() {
        for (known, also) in [
            (r#""cpus":2"#, r#""cpus":2,"sound":true"#),
            (r#""running":true"#, r#""running":true,"sound":true"#),
            (r#""slot":1"#, r#""slot":1,"sound":true"#),
            (r#""base":"x86-64-v3""#, r#""base":"x86-64-v3","sound":true"#),
        ] {
            let newer = FIRST.replace(known, also);
            assert_ne!(newer, FIRST);
            let error = Blueprint::decode(newer.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("unknown field `sound`"), "{error}");
        }
    }
}
