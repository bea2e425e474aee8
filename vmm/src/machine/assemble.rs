//! From a configuration to a machine: the one table of its devices.

use std::fs::File;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice, BusError};
use devices::irq::Line;
use devices::legacy::i8042::{self, I8042};
use devices::legacy::pm::{self, PmControl, PmEvents};
use devices::legacy::reset::{self, ResetControl};
use devices::legacy::rtc::{self, Rtc};
use devices::legacy::serial::{self, Serial};
use devices::pci::host;
use devices::pci::topology::PlaceError;
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

use super::assigned::{self, Assigned};
use super::pci::{Around, Pci};
use super::{Alarm, Device, HostEnds, Machine, Parts};
use crate::arch::model::Processors;
use crate::arch::vcpu::Seen;
use crate::arch::{acpi, cpuid, layout, mptable, msr, regs};
use crate::boot;
use crate::config::{Boot, DeviceConfig, DirtyTracking, HugePages, MachineConfig};
use crate::console::{Output, Room};
use crate::event::Events;
use crate::kvm::{self, IrqLine, Routes, Vm};
use crate::memory::{self, Ram};
use crate::power::PowerSwitch;
use crate::vcpu::{self, Exits, Vcpu, Vcpus, Wiring};

/// The host's side of a machine: what its guest cannot see.
#[derive(Clone, Debug)]
pub(crate) struct HostSide {
    pub(crate) hugepages: Option<HugePages>,
    /// How it is known what the guest writes.
    pub(crate) dirty_tracking: DirtyTracking,
    /// The host's devices that the guest is given.
    pub(crate) devices: Vec<DeviceConfig>,
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
    #[error("cannot write the tables of the machine into guest memory")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// Two PCI functions claim the same place.
    #[error("cannot wire the PCI buses")]
    Pci(#[from] PlaceError),
    /// A device of the host cannot be given to the guest.
    #[error(transparent)]
    Assigned(#[from] assigned::Error),
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
        let ram = memory::allocate(config.memory, host.hugepages)?;
        Self::assemble(config, host, ram, |vm, first, processors| {
            processors.check()?;
            processors.tell_surplus(&cpuid::shown(first)?);
            let bits = cpuid::address_bits(&processors.cpuid);
            vm.check_reach(bits)?;
            let (ram, window) = (vm.ram(), vm.pci_memory_64(bits));
            let rsdp = acpi::write(ram, config.cpus, window.as_ref()).map_err(Error::Tables)?;
            mptable::write(ram, config.cpus).map_err(Error::Tables)?;
            let entry = boot::load(ram, boot, rsdp)?;
            Ok(regs::enter(first, ram, &entry)?)
        })
    }

    /// A machine that waits for a state, and for the content of its RAM if that is not `memory`.
    ///
    /// Its processors have no more than this host gives, whatever was asked for: the state brings
    /// those that its guest knows.
    pub(crate) fn empty(
        config: &MachineConfig,
        host: &HostSide,
        memory: Option<&[File]>,
    ) -> Result<Self, Error> {
        let ram = match memory {
            Some(files) => memory::adopt(files, config.memory, host.hugepages)?,
            None => memory::allocate(config.memory, host.hugepages)?,
        };
        Self::assemble(config, host, ram, |_, _, _| Ok(()))
    }

    /// Builds the machine around `ram`; `load` fills that and readies the first vCPU.
    fn assemble(
        config: &MachineConfig,
        host: &HostSide,
        ram: Ram,
        load: impl FnOnce(&Vm, &VcpuFd, &Processors) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let vm = Arc::new(Vm::new(ram, host.dirty_tracking)?);
        let NewVcpus { fds, shown, processors, seen } = create_vcpus(&vm, config)?;
        load(&vm, &fds[0], &processors)?;

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
        let reset = Arc::new(ResetControl::new(power.clone()));
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let messages = Arc::new(Routes::new(vm.clone()));
        let around = Around {
            pio: &pio,
            mmio: &mmio,
            lines: layout::PCI_GSIS.map(|gsi| line(gsi) as Arc<dyn Line>).collect(),
            messages: messages.clone(),
            memory_64: vm.pci_memory_64(cpuid::address_bits(&seen.cpuid)),
            reset: reset.clone(),
        };
        let Pci { ports, ecam, slots, saved: pci } = Pci::new(config.pci_slots, around)?;
        let mut assigned = Assigned::new(&vm, messages, host.events.clone());
        assigned.insert_cold(&host.devices, slots.as_deref())?;
        // Where each device is, which is also its name in a saved state.
        let devices: Vec<(u64, u64, Arc<dyn Device>)> = vec![
            (serial::PORT, serial::SIZE, host_ends.com1.clone()),
            (rtc::PORT, rtc::SIZE, host_ends.rtc.clone()),
            (pm::EVENTS_PORT, pm::EVENTS_SIZE, host_ends.pm.clone()),
            (pm::CONTROL_PORT, pm::CONTROL_SIZE, Arc::new(PmControl::new(power.clone()))),
            (i8042::PORT, 1, Arc::new(I8042::new(power.clone()))),
        ];
        insert(&pio, "pio/cf8", host::PORT, host::PORTS, ports)?;
        insert(&mmio, "ecam", layout::ECAM.start, layout::ECAM.end - layout::ECAM.start, ecam)?;
        let mut saved = insert_ports(&pio, devices)?;
        saved.push((format!("pio/{:x}", reset::PORT), reset));
        saved.extend(pci);

        let exits = Arc::new(Exits::default());
        let wiring = Wiring { pio, mmio, events: host.events.clone(), exits: exits.clone() };
        Ok(Self {
            vcpus: start_vcpus(&vm, fds, &wiring)?,
            devices: saved,
            slots,
            assigned,
            vm,
            config: config.clone(),
            shown,
            seen,
            running: false,
            exits,
            host_ends,
            power,
        })
    }
}

/// Starts a thread for each vCPU; they wait.
fn start_vcpus(vm: &Arc<Vm>, fds: Vec<VcpuFd>, wiring: &Wiring) -> Result<Arc<Vcpus>, Error> {
    let start = |(index, fd)| Vcpu::start(index, fd, vm.clone(), wiring.clone());
    let vcpus = (0..).zip(fds).map(start).collect::<Result<_, _>>()?;
    Ok(Arc::new(Vcpus::new(vcpus)))
}

/// Lets each device answer at its ports; gives them by their names in a saved state.
fn insert_ports(pio: &Bus, devices: Vec<(u64, u64, Arc<dyn Device>)>) -> Result<Parts, Error> {
    let mut saved = Parts::new();
    for (port, ports, device) in devices {
        let name = format!("pio/{port:x}");
        insert(pio, &name, port, ports, device.clone())?;
        saved.push((name, device));
    }
    Ok(saved)
}

/// Lets `device`, called `name`, answer on `bus`.
fn insert(
    bus: &Bus,
    name: &str,
    base: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
) -> Result<(), Error> {
    bus.insert(base, size, device).map_err(|source| Error::Bus { address: name.to_owned(), source })
}

/// vCPUs that have not run, and what they show.
struct NewVcpus {
    fds: Vec<VcpuFd>,
    /// What this host could show.
    shown: Seen,
    processors: Processors,
    seen: Seen,
}

fn create_vcpus(vm: &Vm, config: &MachineConfig) -> Result<NewVcpus, Error> {
    let fds: Vec<_> =
        (0..config.cpus).map(|index| vm.create_vcpu(index)).collect::<Result<_, _>>()?;
    let first = &fds[0];
    let host_cpuid = cpuid::host(vm.kvm(), first)?;
    let processors = Processors::new(&host_cpuid, &config.cpu)?;
    ready_vcpus(&fds, &processors.cpuid)?;
    let tsc_khz = first.get_tsc_khz().map_err(kvm::Error::ioctl("KVM_GET_TSC_KHZ"))?;
    let seen = Seen { cpuid: cpuid::shown(first)?, tsc_khz };
    Ok(NewVcpus { fds, shown: Seen { cpuid: host_cpuid, tsc_khz }, processors, seen })
}

/// Makes new vCPUs what a PC's firmware would leave, with processors of `cpuid`.
fn ready_vcpus(fds: &[VcpuFd], cpuid: &CpuId) -> Result<(), Error> {
    let count = u8::try_from(fds.len()).expect("no more than were asked for");
    for (index, fd) in (0..).zip(fds) {
        fd.set_cpuid2(&cpuid::of_vcpu(cpuid, index, count)?)
            .map_err(kvm::Error::ioctl("KVM_SET_CPUID2"))?;
        msr::reset(fd)?;
    }
    Ok(())
}
