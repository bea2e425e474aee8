//! What the state of a machine is made of: every format, in the order in which it is saved.

use devices::legacy::{pm, reset, rtc, serial};
use devices::pci::{bridge, host, topology};
use devices::vfio;
use migration::state::Format;

use super::assigned;
use crate::arch::clock::ClockV1;
use crate::arch::irqchip::IrqchipV1;
use crate::arch::vcpu::VcpuV1;

/// What every machine has.
const ALWAYS: [Format; 11] = [
    Format::of::<VcpuV1>(),
    Format::of::<IrqchipV1>(),
    serial::FORMAT,
    rtc::FORMAT,
    pm::EVENTS_FORMAT,
    pm::CONTROL_FORMAT,
    reset::FORMAT,
    host::PORTS_FORMAT,
    host::FORMAT,
    topology::FORMAT,
    Format::of::<ClockV1>(),
];
/// What one with slots has besides.
const WITH_SLOTS: [Format; 2] = [assigned::FORMAT, bridge::FORMAT];
/// What one has besides that takes devices of the host along.
const WITH_DEVICES: [Format; 1] = [vfio::FORMAT];

/// What the state of a machine will be made of.
pub(crate) fn written(slots: bool, devices: bool) -> impl Iterator<Item = Format> {
    let with_slots = WITH_SLOTS.into_iter().filter(move |_| slots);
    let with_devices = WITH_DEVICES.into_iter().filter(move |_| devices);
    ALWAYS.into_iter().chain(with_slots).chain(with_devices)
}

/// All that a machine can be loaded from.
pub(crate) fn read() -> impl Iterator<Item = Format> {
    written(true, true)
}
