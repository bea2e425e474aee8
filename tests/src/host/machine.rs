//! The emulated machine that is the lab host.
use std::fmt;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::agent::PORT;
use crate::artefacts::Artefacts;
use crate::error::{Context, Error, Result};

/// Lazily backed: guests of more than 4 GiB, twice, fit in.
const MEMORY_MIB: u32 = 12 << 10;
/// The file of the memory is the state of the memory: the other file holds the rest.
const WITHOUT_MEMORY: &str = "migrate_set_capability x-ignore-shared on";
const PARAMETERS: &str = "console=ttyS0 panic=-1 mitigations=off intel_iommu=on iommu=pt";

/// How the lab host runs its guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nesting {
    /// This machine's processor runs the lab host, and can run guests in it.
    Hardware,
    /// The processor of the lab host is emulated, with its virtualisation.
    Emulation,
}

impl fmt::Display for Nesting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware => "hardware nesting",
            Self::Emulation => "emulation (this machine offers no nested virtualisation)",
        })
    }
}

impl Nesting {
    /// Finds out what this machine offers this user.
    #[must_use]
    pub fn here() -> Self {
        let on = |module: &str| {
            fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
                .is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        };
        let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if usable && (on("kvm_intel") || on("kvm_amd")) { Self::Hardware } else { Self::Emulation }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Hardware => &["-accel", "kvm", "-cpu", "host", "-smp", "2"],
            // With more physical address bits the firmware puts the BARs of virtual functions
            // where QEMU maps their low halves only.
            Self::Emulation => {
                &["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,phys-bits=36", "-smp", "3"]
            }
        }
    }

    /// The command line of the lab host's kernel.
    pub(super) fn parameters(self) -> String {
        match self {
            Self::Hardware => PARAMETERS.to_owned(),
            // The first processor runs no guests. Whenever another one loads floating-point state,
            // QEMU clears a flag in a word of the first one's (`cpu_clear_ignne`), and not
            // atomically: what that one writes there meanwhile is lost, which may be that it left
            // the nested page tables. The guest then gets the lab host's registers, and dies.
            Self::Emulation => format!("{PARAMETERS} isolcpus=0 iomem=relaxed"),
        }
    }
}

/// Where the machine's parts come from and go to.
pub(super) struct Machine<'a> {
    pub(super) artefacts: &'a Artefacts,
    /// A listening socket that the port of the agent is connected to.
    pub(super) socket: &'a Path,
    /// The file that gets the console.
    pub(super) console: &'a Path,
    /// The file that is, or shall be, the content of its memory.
    pub(super) memory: &'a Path,
}

impl Machine<'_> {
    /// Starts the machine from nothing. What it writes to its memory goes to the file.
    pub(super) fn boot(&self) -> Result<Child> {
        let mut command = self.command("on");
        command.args(["-monitor", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().context(|| "cannot start QEMU".into())
    }

    /// Starts the machine from a kept state. The file of its memory stays as it is.
    pub(super) fn resume(&self, state: &Path) -> Result<Child> {
        let mut command = self.command("off");
        command.args(["-incoming", "defer", "-monitor", "stdio"]);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().context(|| "cannot start QEMU".into())?;
        let monitor = child.stdin.as_mut().expect("stdin is piped");
        let script = format!("{WITHOUT_MEMORY}\nmigrate_incoming file:{}\n", state.display());
        monitor.write_all(script.as_bytes()).context(|| "cannot command QEMU".into())?;
        Ok(child)
    }

    fn command(&self, share: &str) -> Command {
        // The machine ends with the lab however that ends, and gets no keyboard signals of its own.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(arguments());
        command.args(["-chardev", &format!("socket,id=agent,path={}", self.socket.display())]);
        command.args(["-serial", &format!("file:{}", self.console.display())]);
        let (size, path) = (MEMORY_MIB, self.memory.display());
        command.args([
            "-object",
            &format!("memory-backend-file,id=ram,size={size}M,share={share},mem-path={path}"),
        ]);
        command.arg("-kernel").arg(self.artefacts.kernel.vmlinux());
        command.arg("-initrd").arg(&self.artefacts.host_initrd);
        command.args(["-append", &Nesting::here().parameters()]).process_group(0);
        if let Ok(console) = fs::OpenOptions::new().create(true).append(true).open(self.console) {
            command.stderr(console);
        }
        command
    }
}

/// Keeps the state of a machine that [`Machine::boot`] started, and ends it.
pub(super) fn keep(mut machine: Child, state: &Path) -> Result<()> {
    let mut monitor = machine.stdin.take().expect("stdin is piped");
    // It is not stopped before: it would come back as it went.
    let script = format!("{WITHOUT_MEMORY}\nmigrate file:{}\nquit\n", state.display());
    monitor.write_all(script.as_bytes()).context(|| "cannot command QEMU".into())?;
    drop(monitor);
    let output = machine.wait_with_output().context(|| "cannot wait for QEMU".into())?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().find(|line| line.contains("Error")) {
        Some(error) => {
            Err(Error::Host(format!("QEMU cannot keep the state of the lab host: {error}")))
        }
        None => Ok(()),
    }
}

/// What both a new machine and its kept state must have in common, but for the kernel.
pub(super) fn arguments() -> Vec<String> {
    let mut arguments = vec!["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"];
    arguments.extend(["-machine", "q35,kernel-irqchip=split,memory-backend=ram"]);
    arguments.extend(Nesting::here().arguments());
    arguments.extend(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    arguments
        .extend(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    arguments.extend(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    arguments.extend(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    let mut arguments = arguments.into_iter().map(str::to_owned).collect::<Vec<_>>();
    arguments.extend(["-m".into(), format!("{MEMORY_MIB}M")]);
    arguments.extend(["-device".into(), format!("virtserialport,chardev=agent,name={PORT}")]);
    arguments.extend(["-netdev".into(), "hubport,id=peer,hubid=0".into()]);
    let peer = "virtio-net-pci,netdev=peer,mac=52:54:00:07:00:0f,romfile=";
    arguments.extend(["-device".into(), peer.into()]);
    for index in 0..2 {
        // One hub joins the two NICs: they are two hosts' NICs on one switch. A root port each,
        // because a physical function and its virtual ones share a bus number.
        arguments.extend(["-netdev".into(), format!("hubport,id=n{index},hubid=0")]);
        let port = format!(
            "pcie-root-port,id=rp{index},slot={},mem-reserve=32M,pref32-reserve=32M",
            index + 1
        );
        let nic = format!("igb,bus=rp{index},netdev=n{index},mac=52:54:00:07:00:0{index},romfile=");
        arguments.extend(["-device".into(), port, "-device".into(), nic]);
    }
    arguments.extend(old_nics());
    arguments
}

/// Two conventional NICs behind one bridge, on the same switch: they have no interrupts but INTx,
/// and an IOMMU group in common, as the bridge hides which of them does DMA.
fn old_nics() -> Vec<String> {
    let mut devices = vec!["pcie-root-port,id=rp2,slot=3".to_owned()];
    devices.push("pcie-pci-bridge,id=conventional,bus=rp2".into());
    let mut arguments = Vec::new();
    for number in 2..4 {
        arguments.extend(["-netdev".into(), format!("hubport,id=n{number},hubid=0")]);
        let (place, address) = ("bus=conventional", format!("52:54:00:07:00:0{number}"));
        devices
            .push(format!("e1000,{place},addr={number},netdev=n{number},mac={address},romfile="));
    }
    arguments.extend(devices.into_iter().flat_map(|device| ["-device".into(), device]));
    arguments
}
