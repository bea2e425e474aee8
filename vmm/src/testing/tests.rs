//! What a guest of the first build was saved as, which every build reads.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use migration::guest::Departing;
use migration::state::{StateReader, StateWriter};

use super::*;
use crate::arch::clock::ClockV1;
use crate::arch::irqchip::IrqchipV1;
use crate::arch::vcpu::VcpuV1;
use crate::config::{Boot, CpuBase, CpuModel, DirtyTracking, MachineConfig, SerialMode};
use crate::console::Console;
use crate::event;
use crate::guest::{Leaving, Traits};
use crate::machine::{Alarm, AssignedV1, HostSide, Machine};
use crate::vcpu::block_kicks;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/machine")
}

fn kept(name: &str) -> Vec<u8> {
    fs::read(corpus().join(format!("valid-{name}"))).unwrap()
}

fn assert_reads<T: Saved>(name: &str) {
    let bytes = kept(name);
    assert!(decoded::<T>(&bytes).is_some(), "{name}");
    let shorter = (0..bytes.len()).find(|&len| decoded::<T>(&bytes[..len]).is_some());
    assert_eq!(shorter, None, "{name}");
}

#[test]
fn what_was_saved_once_can_be_read_and_nothing_that_is_shorter() {
    assert_reads::<VcpuV1>("vcpu");
    assert_reads::<IrqchipV1>("irqchip");
    assert_reads::<ClockV1>("clock");
    assert_reads::<AssignedV1>("devices");
    guest::read_blueprint(&kept("blueprint"));
}

/// The built-in guest, which has run for a while on processors of a level.
fn machine() -> Machine {
    let console = Console::open(&SerialMode::Null).unwrap();
    let (events, _unheard) = event::queue().unwrap();
    let host = HostSide {
        hugepages: None,
        dirty_tracking: DirtyTracking::Log,
        devices: Vec::new(),
        output: console.output(),
        room: console.room(),
        alarm: Alarm::new().unwrap(),
        events,
    };
    let cpu = CpuModel::from(CpuBase::V2);
    let config = MachineConfig { cpus: 1, pci_slots: 2, cpu, ..MachineConfig::default() };
    block_kicks().unwrap();
    let mut machine = Machine::booted(&config, &Boot::default(), &host).unwrap();
    machine.resume().unwrap();
    thread::sleep(Duration::from_secs(10));
    machine.pause().unwrap();
    machine
}

#[test]
#[ignore = "writes what a machine saves now into the corpus"]
fn keep_what_a_machine_saves() {
    let machine = machine();
    let mut state = StateWriter::new();
    machine.save(&mut state).unwrap();
    let mut state = StateReader::open(state.bytes()).unwrap();
    let vcpu: VcpuV1 = state.at("vcpu/0").take().unwrap();
    let irqchip: IrqchipV1 = state.at("irqchip").take().unwrap();
    let clock: ClockV1 = state.at("clock").take().unwrap();
    let name = "web".parse().unwrap();
    let traits = Traits { name, built_in: true, bounces: false, devices: Vec::new() };
    let blueprint = Leaving::new(machine, traits).ok().unwrap().offer().config;
    for (name, bytes) in [
        ("vcpu", encoded(&vcpu)),
        ("irqchip", encoded(&irqchip)),
        ("clock", encoded(&clock)),
        ("devices", encoded(&vec![("net0", 1_u8)])),
        ("blueprint", blueprint),
    ] {
        fs::write(corpus().join(format!("valid-{name}")), bytes).unwrap();
    }
}
