//! What a VM is made of, once everything that was typed is understood and checked.

mod address;
mod cpu;
mod device;
mod host;
mod name;
mod serial;
mod size;
mod tracking;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use address::{Address, AddressError};
pub use cpu::{CpuBase, CpuError, CpuFeature, CpuModel, CpuSource};
pub use device::{
    DeviceConfig, DeviceError, DeviceId, HostDevice, OnTimeout, SLOTS, Strategy, TogetherError,
};
pub use host::HugePages;
pub use name::{NameError, VmName};
pub use serial::{SerialError, SerialMode};
pub use size::{Size, SizeError};
pub use tracking::{DirtyTracking, NoSuchTracking};

/// The smallest guest memory, in bytes: what the smallest guest that is supported boots in.
pub const MEMORY_MIN: u64 = 64 << 20;
/// Guest memory comes in whole MiB, so that every region starts and ends on one.
pub const MEMORY_STEP: u64 = 1 << 20;
/// How many vCPUs a VM may have.
pub const CPUS: RangeInclusive<u8> = 1..=8;
/// How many slots for PCI devices a VM may have.
pub const PCI_SLOTS: RangeInclusive<u8> = 0..=31;

/// Everything `uvmm run` needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunConfig {
    /// The VM's name; `None` takes the lowest free of `vm0`, `vm1`, ….
    pub name: Option<VmName>,
    /// What the guest boots. One that is migrated here boots it when it asks for a reset.
    pub boot: Boot,
    /// What the guest sees.
    pub machine: MachineConfig,
    /// The size of the host's pages behind guest memory; `None` for ordinary ones.
    pub hugepages: Option<HugePages>,
    /// How it is known what the guest writes while it is migrated from here.
    pub dirty_tracking: DirtyTracking,
    /// The host's devices that the guest is given.
    pub devices: Vec<DeviceConfig>,
    /// Where the first serial line is connected.
    pub serial: SerialMode,
    /// Wait here for a guest that is migrated to this VM, instead of booting one.
    pub incoming: Option<Address>,
    /// Restore the guest that this snapshot holds, instead of booting one.
    pub restore: Option<PathBuf>,
}

/// What the guest boots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Boot {
    /// A bzImage or an ELF `vmlinux` with a PVH note; `None` for the built-in tiny guest.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; `None` for a default that has a console on the serial line.
    pub cmdline: Option<String>,
}

impl Boot {
    /// Whether the command line has Linux bounce all DMA through memory that a CPU copies
    /// (kernel-parameters.txt, `swiotlb=`).
    #[must_use]
    pub fn bounces_dma(&self) -> bool {
        let words = self.cmdline.as_deref().unwrap_or_default().split_ascii_whitespace();
        let settings = words.filter_map(|word| word.strip_prefix("swiotlb="));
        settings.flat_map(|setting| setting.split(',')).any(|setting| setting == "force")
    }
}

/// What the guest can see of its machine: the same on both sides of a migration.
///
/// It travels in the migration's offer, by the names of its fields. One that is added has to have a
/// default that is what all machines were until then, and is left out where it has that: so older
/// builds can make the machine, or refuse it by the name of what they do not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Bytes of guest memory: a multiple of [`MEMORY_STEP`], at least [`MEMORY_MIN`].
    pub memory: u64,
    /// The number of vCPUs, within [`CPUS`].
    pub cpus: u8,
    /// The number of slots for PCI devices that come and go, within [`PCI_SLOTS`]; without any
    /// there is no bridge either.
    pub pci_slots: u8,
    /// What processors the vCPUs are.
    pub cpu: CpuModel,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig { memory: 512 << 20, cpus: 1, pci_slots: 4, cpu: CpuModel::default() }
    }
}

/// Why a configuration makes no VM.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Less memory than any guest boots in.
    #[error("memory {0} is too small: the least is {min}", min = Size(MEMORY_MIN))]
    MemoryTooSmall(Size),
    /// Memory that is not a whole number of pages of the size asked for.
    #[error("memory {memory} is not a multiple of {step}: round it")]
    MemoryNotAligned {
        /// What was asked for.
        memory: Size,
        /// What it must be a multiple of.
        step: Size,
    },
    /// More memory than this host has.
    #[error(
        "memory {memory} is more than this host has ({ram} of RAM, {swap} of swap): ask for less"
    )]
    MemoryTooLarge {
        /// What was asked for.
        memory: Size,
        /// The RAM that the kernel of this host manages, rounded down to MiB.
        ram: Size,
        /// Its swap, rounded down to MiB.
        swap: Size,
    },
    /// Not enough huge pages are reserved.
    #[error(
        "memory {memory} in huge pages of {page} needs {needed} of them, but {free} are free: \
         write a larger number to {pool}"
    )]
    HugePages {
        /// What was asked for.
        memory: Size,
        /// The size of one page.
        page: HugePages,
        /// How many that makes.
        needed: u64,
        /// How many this host can still give.
        free: u64,
        /// The file that sets how many there are.
        pool: String,
    },
    /// The host's kernel knows no pages of that size.
    #[error("this host has no huge pages of {0}: leave --hugepages out or choose another size")]
    NoHugePages(HugePages),
    /// A number of vCPUs that is not supported.
    #[error("{0} vCPUs are not possible: choose {min} to {max}", min = CPUS.start(), max = CPUS.end())]
    Cpus(u64),
    /// More slots than a hot-plug controller can have.
    #[error("{0} PCI slots are not possible: choose {min} to {max}", min = PCI_SLOTS.start(), max = PCI_SLOTS.end())]
    PciSlots(u64),
    /// Devices that cannot be in one machine.
    #[error(transparent)]
    Devices(#[from] TogetherError),
    /// A guest from elsewhere, and one from a file.
    #[error("there is room for one guest: leave out --incoming or --restore")]
    TwoGuests,
    /// Something that only a kernel can use.
    #[error("{0} needs --kernel: the built-in guest takes none")]
    NeedsKernel(&'static str),
}

impl MachineConfig {
    /// Checks what was asked for against what uvmm supports, whatever the host.
    ///
    /// Also for a configuration that came from a migration peer.
    ///
    /// # Errors
    /// The first of memory and vCPUs that is out of range.
    pub fn check(&self) -> Result<(), ConfigError> {
        let memory = Size(self.memory);
        if self.memory < MEMORY_MIN {
            return Err(ConfigError::MemoryTooSmall(memory));
        }
        if !self.memory.is_multiple_of(MEMORY_STEP) {
            return Err(ConfigError::MemoryNotAligned { memory, step: Size(MEMORY_STEP) });
        }
        if !CPUS.contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus.into()));
        }
        if !PCI_SLOTS.contains(&self.pci_slots) {
            return Err(ConfigError::PciSlots(self.pci_slots.into()));
        }
        Ok(())
    }

    /// Checks whether this host can give it memory, in pages of the size asked for.
    ///
    /// # Errors
    /// There is not enough, or there are no such pages.
    pub fn check_host(&self, hugepages: Option<HugePages>) -> Result<(), ConfigError> {
        host::check_memory(self.memory, hugepages)
    }
}

impl RunConfig {
    /// Checks everything that can be known before anything is made.
    ///
    /// # Errors
    /// The first thing that makes no VM, here or on this host.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.machine.check()?;
        if self.incoming.is_some() || self.restore.is_some() {
            // How much memory is needed is up to the guest that comes: it is checked then.
            self.hugepages.map(host::free_pages).transpose()?;
        } else {
            self.machine.check_host(self.hugepages)?;
        }
        if self.incoming.is_some() && self.restore.is_some() {
            return Err(ConfigError::TwoGuests);
        }
        let Boot { kernel, initrd, .. } = &self.boot;
        if initrd.is_some() && kernel.is_none() {
            return Err(ConfigError::NeedsKernel("--initrd"));
        }
        device::check_together(&self.devices)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(memory: u64, cpus: u8) -> RunConfig {
        RunConfig {
            name: None,
            boot: Boot::default(),
            machine: MachineConfig { memory, cpus, ..MachineConfig::default() },
            hugepages: None,
            dirty_tracking: DirtyTracking::Log,
            devices: Vec::new(),
            serial: SerialMode::Null,
            incoming: None,
            restore: None,
        }
    }

    #[test]
    fn a_guest_that_bounces_all_dma_is_known_by_its_command_line() {
        for (cmdline, bounces) in [
            ("quiet swiotlb=force", true),
            ("swiotlb=131072,force", true),
            ("swiotlb=131072,2,force quiet", true),
            ("swiotlb=131072", false),
            ("xswiotlb=force swiotlb=noforce", false),
        ] {
            let boot = Boot { cmdline: Some(cmdline.into()), ..Boot::default() };
            assert_eq!(boot.bounces_dma(), bounces, "{cmdline}");
        }
        assert!(!Boot::default().bounces_dma());
    }

    #[test]
    fn the_smallest_and_the_default_machine_pass() {
        config(MEMORY_MIN, 1).check().unwrap();
        config(MEMORY_MIN, 8).check().unwrap();
        MachineConfig::default().check().unwrap();
    }

    #[test]
    fn an_impossible_machine_is_refused_in_one_line_that_says_what_is_possible() {
        for (config, says) in [
            (config(0, 1), "the least is 64M"),
            (config(MEMORY_MIN - 1, 1), "the least is 64M"),
            (config(MEMORY_MIN + 1, 1), "not a multiple of 1M"),
            (config(1 << 60, 1), "of RAM"),
            (config(MEMORY_MIN, 0), "choose 1 to 8"),
            (config(MEMORY_MIN, 9), "choose 1 to 8"),
        ] {
            let text = config.check().unwrap_err().to_string();
            assert!(text.contains(says) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn how_much_memory_there_must_be_is_not_asked_before_the_guest_comes() {
        let mut config = config(1 << 60, 1);
        config.incoming = Some("unix:/run/somewhere".parse().unwrap());
        config.check().unwrap();
        config.incoming = None;
        config.check().unwrap_err();
    }

    #[test]
    fn a_controller_has_31_slots_at_most() {
        let mut config = config(MEMORY_MIN, 1);
        for (slots, possible) in [(0, true), (31, true), (32, false)] {
            config.machine.pci_slots = slots;
            assert_eq!(config.check().is_ok(), possible, "{slots}");
        }
    }

    #[test]
    fn devices_that_do_not_go_together_are_refused() {
        let mut config = config(MEMORY_MIN, 1);
        config.devices = vec!["vfio,id=a,host=01:10.0".parse().unwrap(); 2];
        assert!(matches!(config.check(), Err(ConfigError::Devices(_))));
        config.devices.pop();
        config.check().unwrap();
    }

    #[test]
    fn what_only_a_kernel_can_use_is_refused_without_one() {
        let mut config = config(MEMORY_MIN, 1);
        config.boot.initrd = Some("initrd".into());
        assert!(matches!(config.check(), Err(ConfigError::NeedsKernel("--initrd"))));
        config.boot.kernel = Some("kernel".into());
        config.check().unwrap();
        config.incoming = Some("tcp:127.0.0.1:0".parse().unwrap());
        config.check().expect("a guest that arrives boots it when it asks for a reset");
        config.restore = Some("snapshot".into());
        assert!(matches!(config.check(), Err(ConfigError::TwoGuests)));
    }
}
