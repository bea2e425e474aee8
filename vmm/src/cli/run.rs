//! `uvmm run`: flags and file to configuration.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

use super::{Failure, file};
use crate::config::{
    Address, Boot, ConfigError, CpuModel, CpuSource, DeviceConfig, DirtyTracking, HugePages,
    MachineConfig, RunConfig, SerialMode, Size, VmName,
};
use crate::log;

/// What was typed, or written in the file: the same names in both.
#[derive(Debug, Default, PartialEq, Args, Deserialize)]
#[command(after_help = KEYS)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RunArgs {
    /// The VM's name [default: the lowest free of vm0, vm1, ...]
    #[arg(long, value_name = "N")]
    name: Option<VmName>,
    /// A TOML file with any of these settings by the same names; what is typed wins. Paths in it
    /// start at its own directory.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// The guest's kernel: a bzImage, or a vmlinux with PVH [default: a tiny built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: a console on the serial line]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Guest memory, 64M or more [default: 512M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// The number of vCPUs, 1 to 8 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u64>,
    /// What processors the guest sees: host, x86-64-v2, x86-64-v3, x86-64-v4, or a TOML file with
    /// base and lists add and remove of features; the same at every host it moves to
    /// [default: host]
    #[arg(long, value_name = "CPU")]
    cpu: Option<CpuSource>,
    /// The number of hot-plug slots for PCI devices, 0 to 31 [default: 4]
    #[arg(long, value_name = "N")]
    pci_slots: Option<u64>,
    /// Back guest memory with huge pages of 2M or 1G [without a size: 2M]
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, default_missing_value = "2M")]
    hugepages: Option<HugePages>,
    /// How KVM tells what the guest writes while it is migrated: log, one bitmap of all memory; or
    /// ring, a list for each vCPU, so that those that write most can be slowed down first
    /// [default: log]
    #[arg(long, value_name = "HOW")]
    dirty_tracking: Option<DirtyTracking>,
    /// Give the guest a device of the host, vfio,id=ID,host=BDF[,slot=N][,strategy=S], where BDF may
    /// be a path below /sys and S is auto, pause, evict, native or refuse; may be repeated
    #[arg(long = "device", value_name = "DEVICE")]
    #[serde(rename = "device")]
    devices: Vec<DeviceConfig>,
    /// Where the serial line goes: stdio, null, file=F or socket=F [default: stdio]
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialMode>,
    /// Wait at tcp:ADDR:PORT or unix:PATH for a guest that is migrated here; memory and vCPUs are
    /// then those of that guest, and --kernel is what it boots if it asks for a reset
    #[arg(long, value_name = "ADDRESS")]
    incoming: Option<Address>,
    /// Restore the guest that `uvmm snapshot` wrote to this file: a copy, which may run beside the
    /// guest itself and other copies; memory, vCPUs and --kernel are as for --incoming
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
    /// Append the log to this file instead of writing it to standard error
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Log more; may be repeated
    #[arg(long, short, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// For the help page; a test holds it against [`crate::console::HELP`].
const KEYS: &str = "\
Keys, when the serial line is a terminal:
  Ctrl-A x  ends the VM
  Ctrl-A a  sends Ctrl-A to the guest (so does Ctrl-A Ctrl-A)
  Ctrl-A h  shows this";

impl RunArgs {
    /// Reads the file if there is one, begins the log and checks everything.
    pub(super) fn begin(self) -> Result<RunConfig, Failure> {
        let args = match &self.config {
            Some(path) => {
                let mut file: RunArgs = file::read(path)?;
                file.start_paths_at(path.parent().unwrap_or(Path::new("")));
                self.or(file)
            }
            None => self,
        };
        log::begin(args.log.as_deref(), args.verbose)?;
        let cpu = match &args.cpu {
            None => CpuModel::default(),
            Some(CpuSource::Named(base)) => (*base).into(),
            Some(CpuSource::File(path)) => file::read(path)?,
        };
        let config = args.understand(cpu)?;
        config.check()?;
        Ok(config)
    }

    /// These settings, and those of `other` where there is none.
    fn or(self, other: RunArgs) -> RunArgs {
        RunArgs {
            name: self.name.or(other.name),
            config: self.config,
            kernel: self.kernel.or(other.kernel),
            initrd: self.initrd.or(other.initrd),
            cmdline: self.cmdline.or(other.cmdline),
            memory: self.memory.or(other.memory),
            cpus: self.cpus.or(other.cpus),
            cpu: self.cpu.or(other.cpu),
            pci_slots: self.pci_slots.or(other.pci_slots),
            hugepages: self.hugepages.or(other.hugepages),
            dirty_tracking: self.dirty_tracking.or(other.dirty_tracking),
            devices: with_others(self.devices, other.devices),
            serial: self.serial.or(other.serial),
            incoming: self.incoming.or(other.incoming),
            restore: self.restore.or(other.restore),
            log: self.log.or(other.log),
            verbose: self.verbose.max(other.verbose),
        }
    }

    fn start_paths_at(&mut self, dir: &Path) {
        let serial = match &mut self.serial {
            Some(SerialMode::File(path) | SerialMode::Socket(path)) => Some(path),
            _ => None,
        };
        let incoming = match &mut self.incoming {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        let cpu = match &mut self.cpu {
            Some(CpuSource::File(path)) => Some(path),
            _ => None,
        };
        let own = [&mut self.kernel, &mut self.initrd, &mut self.restore, &mut self.log];
        for path in own.into_iter().flatten().chain(serial).chain(incoming).chain(cpu) {
            *path = dir.join(&*path);
        }
    }

    fn understand(self, cpu: CpuModel) -> Result<RunConfig, ConfigError> {
        let default = MachineConfig::default();
        let cpus = self.cpus.unwrap_or(default.cpus.into());
        let pci_slots = self.pci_slots.unwrap_or(default.pci_slots.into());
        Ok(RunConfig {
            name: self.name,
            boot: Boot { kernel: self.kernel, initrd: self.initrd, cmdline: self.cmdline },
            machine: MachineConfig {
                memory: self.memory.map_or(default.memory, |Size(bytes)| bytes),
                cpus: u8::try_from(cpus).map_err(|_| ConfigError::Cpus(cpus))?,
                pci_slots: u8::try_from(pci_slots).map_err(|_| ConfigError::PciSlots(pci_slots))?,
                cpu,
            },
            hugepages: self.hugepages,
            dirty_tracking: self.dirty_tracking.unwrap_or_default(),
            devices: self.devices,
            serial: self.serial.unwrap_or_default(),
            incoming: self.incoming,
            restore: self.restore,
        })
    }
}

/// `devices`, and those of `others` that have other ids.
fn with_others(mut devices: Vec<DeviceConfig>, others: Vec<DeviceConfig>) -> Vec<DeviceConfig> {
    let typed = devices.len();
    for other in others {
        if devices[..typed].iter().all(|device| device.id != other.id) {
            devices.push(other);
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use crate::config::CpuBase;
    use crate::console;
    use clap::{CommandFactory, Parser};

    fn typed(flags: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["uvmm", "run"].iter().chain(flags)).unwrap().command {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    const FLAGS: [&str; 31] = [
        "--name",
        "a",
        "--kernel",
        "k",
        "--initrd",
        "i",
        "--cmdline",
        "c d",
        "--memory",
        "1G",
        "--cpus",
        "4",
        "--cpu",
        "pool.toml",
        "--pci-slots",
        "2",
        "--hugepages=1G",
        "--dirty-tracking",
        "ring",
        "--device",
        "vfio,id=n,host=01:10.0",
        "--serial",
        "file=s",
        "--incoming",
        "unix:u",
        "--restore",
        "r",
        "--log",
        "l",
        "-v",
        "-v",
    ];
    const FILE: &str = "
        name = 'a'
        kernel = 'k'
        initrd = 'i'
        cmdline = 'c d'
        memory = '1G'
        cpus = 4
        cpu = 'pool.toml'
        pci_slots = 2
        hugepages = '1G'
        dirty_tracking = 'ring'
        device = [{ type = 'vfio', id = 'n', host = '0000:01:10.0' }]
        serial = 'file=s'
        incoming = 'unix:u'
        restore = 'r'
        log = 'l'
        verbose = 2
    ";

    #[test]
    fn the_file_takes_everything_that_flags_take() {
        assert_eq!(toml::from_str::<RunArgs>(FILE).unwrap(), typed(&FLAGS));
        let flags = Cli::command().find_subcommand("run").unwrap().get_arguments().count();
        let keys = FILE.lines().filter(|line| line.contains('=')).count();
        assert_eq!(keys + 1, flags, "a flag is missing in this test: all but --config");
    }

    #[test]
    fn what_is_typed_wins_over_the_file() {
        let args = typed(&["--memory", "64M", "--serial", "null"]);
        let merged = args.or(toml::from_str("memory = '1G'\ncpus = 2\npci_slots = 7").unwrap());
        let config = merged.understand(CpuBase::V2.into()).unwrap();
        let cpu = CpuBase::V2.into();
        assert_eq!(config.machine, MachineConfig { memory: 64 << 20, cpus: 2, pci_slots: 7, cpu });
        assert_eq!(config.serial, SerialMode::Null);
    }

    #[test]
    fn a_typed_device_replaces_the_one_of_its_name_in_the_file() {
        let args = typed(&["--device", "vfio,id=n,host=02:10.0"]);
        let file = "
            [[device]]
            type = 'vfio'
            id = 'n'
            host = '01:10.0'
            [[device]]
            type = 'vfio'
            id = 'm'
            host = '03:10.0'
        ";
        let config =
            args.or(toml::from_str(file).unwrap()).understand(CpuModel::default()).unwrap();
        let texts: Vec<_> = config.devices.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["vfio,id=n,host=0000:02:10.0", "vfio,id=m,host=0000:03:10.0"]);
    }

    #[test]
    fn paths_in_the_file_start_at_its_directory() {
        let mut args: RunArgs = toml::from_str(FILE).unwrap();
        args.initrd = Some("/abs".into());
        args.start_paths_at(Path::new("/d"));
        assert_eq!(args.kernel, Some("/d/k".into()));
        assert_eq!(args.initrd, Some("/abs".into()));
        assert_eq!(args.log, Some("/d/l".into()));
        assert_eq!(args.cpu, Some(CpuSource::File("/d/pool.toml".into())));
        assert_eq!(args.restore, Some("/d/r".into()));
        assert_eq!(args.serial, Some(SerialMode::File("/d/s".into())));
        assert_eq!(args.incoming, Some(Address::Unix("/d/u".into())));
    }

    #[test]
    fn nothing_typed_is_the_default_machine() {
        let config = typed(&[]).understand(CpuModel::default()).unwrap();
        assert_eq!(config.machine, MachineConfig::default());
        assert_eq!((config.boot, config.serial), (Boot::default(), SerialMode::Stdio));
        assert_eq!(typed(&["--hugepages"]).hugepages, Some(HugePages::Size2M));
        assert!(typed(&["--cpus", "256"]).understand(CpuModel::default()).is_err());
    }

    #[test]
    fn the_help_page_tells_the_keys() {
        for key in console::HELP.lines() {
            assert!(KEYS.contains(key), "{key}");
        }
    }
}
