//! From a configuration to a machine: the one table of its devices.

use std::sync::Arc;

use devices::bus::{Bus, BusError};
use devices::legacy::i8042::{self, I8042};
use devices::legacy::pm::{self, PmControl, PmEvents};
use devices::legacy::reset::{self, ResetControl};
use devices::legacy::rtc::{self, Rtc};
use devices::legacy::serial::{self, Serial};
use kvm_ioctls::VcpuFd;

use super::{Alarm, Device, HostEnds, Machine};
use crate::arch::{acpi, cpuid, msr, regs};
use crate::boot;
use crate::config::{Boot, HugePages, MachineConfig};
use crate::console::{Output, Room};
use crate::event::Events;
use crate::kvm::{self, IrqLine, Vm};
use crate::memory::{self, Ram};
use crate::power::PowerSwitch;
use crate::vcpu::{self, Exits, Vcpu, Vcpus, Wiring};

/// The host's side of a machine: what its guest cannot see.
#[derive(Clone, Debug)]
pub(crate) struct HostSide {
    pub(crate) hugepages: Option<HugePages>,
    /// Where COM1 writes to.
    pub(crate) output: Output,
    /// What COM1 rings when it can take more input.
    pub(crate) room: Room,
    /// What the real-time clock rings when it has to be looked at.
    pub(crate) alarm: Alarm,
    pub(crate) events: Events,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// A vCPU could not be started.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The vCPU could not be put at the kernel's entry.
    #[error(transparent)]
    Entry(#[from] regs::BootError),
    /// The tables do not fit.
    #[error("cannot write the ACPI tables into guest memory")]
    Acpi(#[source] vm_memory::GuestMemoryError),
    /// Two devices claim the same addresses.
    #[error("cannot place {address}")]
    Bus {
        /// The device.
        address: String,
        /// Why.
        #[source]
        source: BusError,
    },
}

impl Machine {
    /// A machine that stands at the entry of what `boot` names.
    pub(crate) fn booted(
        config: &MachineConfig,
        boot: &Boot,
        host: &HostSide,
    ) -> Result<Self, Error> {
        Self::assemble(config, host, |ram, first| {
            let rsdp = acpi::write(ram, config.cpus).map_err(Error::Acpi)?;
            let entry = boot::load(ram, boot, rsdp)?;
            Ok(regs::enter(first, ram, &entry)?)
        })
    }

    /// A machine that waits for a state and the content of its RAM.
    pub(crate) fn empty(config: &MachineConfig, host: &HostSide) -> Result<Self, Error> {
        Self::assemble(config, host, |_, _| Ok(()))
    }

    /// Builds the machine; `load` fills its RAM and readies its first vCPU.
    fn assemble(
        config: &MachineConfig,
        host: &HostSide,
        load: impl FnOnce(&Ram, &VcpuFd) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let ram = memory::allocate(config.memory, host.hugepages)?;
        let vm = Arc::new(Vm::new(ram)?);
        let fds = create_vcpus(&vm, config.cpus)?;
        let tsc_khz = fds[0].get_tsc_khz().map_err(kvm::Error::ioctl("KVM_GET_TSC_KHZ"))?;
        load(vm.ram(), &fds[0])?;

        let power = Arc::new(PowerSwitch::new(host.events.clone()));
        let (alarm, room) = (host.alarm.clone(), host.room.clone());
        let line = |gsi| IrqLine::new(vm.clone(), gsi);
        let host_ends = HostEnds {
            com1: Arc::new(Serial::new(
                line(serial::IRQ),
                Box::new(host.output.clone()),
                move || {
                    room.notify();
                },
            )),
            rtc: Arc::new(Rtc::new(line(rtc::IRQ), move || alarm.ring())),
            pm: Arc::new(PmEvents::new(line(pm::SCI))),
        };
        // Where each device is, which is also its name in a saved state.
        let devices: [(u64, u64, Arc<dyn Device>); 6] = [
            (serial::PORT, serial::SIZE, host_ends.com1.clone()),
            (rtc::PORT, rtc::SIZE, host_ends.rtc.clone()),
            (pm::EVENTS_PORT, pm::EVENTS_SIZE, host_ends.pm.clone()),
            (pm::CONTROL_PORT, pm::CONTROL_SIZE, Arc::new(PmControl::new(power.clone()))),
            (reset::PORT, 1, Arc::new(ResetControl::new(power.clone()))),
            (i8042::PORT, 1, Arc::new(I8042::new(power.clone()))),
        ];

        let (pio, mmio) = (Bus::new(), Bus::new());
        let mut named = Vec::new();
        for (port, ports, device) in devices {
            let address = format!("pio/{port:x}");
            pio.insert(port, ports, device.clone())
                .map_err(|source| Error::Bus { address: address.clone(), source })?;
            named.push((address, device));
        }
        let exits = Arc::new(Exits::default());
        let wiring = Wiring {
            pio: Arc::new(pio),
            mmio: Arc::new(mmio),
            events: host.events.clone(),
            exits: exits.clone(),
        };
        let vcpus =
            (0..).zip(fds).map(|(index, fd)| Vcpu::start(index, fd, vm.clone(), wiring.clone()));
        let vcpus = Arc::new(Vcpus::new(vcpus.collect::<Result<_, _>>()?));
        Ok(Self {
            vcpus,
            devices: named,
            vm,
            config: config.clone(),
            tsc_khz,
            running: false,
            exits,
            host_ends,
            power,
        })
    }
}

/// vCPUs as a PC's firmware would leave them.
fn create_vcpus(vm: &Vm, count: u8) -> Result<Vec<VcpuFd>, Error> {
    let cpuid = cpuid::host(vm.kvm())?;
    (0..count)
        .map(|index| {
            let fd = vm.create_vcpu(index)?;
            fd.set_cpuid2(&cpuid::of_vcpu(&cpuid, index, count)?)
                .map_err(kvm::Error::ioctl("KVM_SET_CPUID2"))?;
            msr::reset(&fd)?;
            Ok(fd)
        })
        .collect()
}
