//! The emulated machine that is the lab host.
use std::fmt;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::agent::PORT;
use crate::artefacts::Artefacts;
use crate::error::{Context, Result, writing};

/// Lazily backed: guests of more than 4 GiB, twice, fit in.
const MEMORY_MIB: u32 = 12 << 10;

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
            Self::Hardware => &["-accel", "kvm", "-cpu", "host"],
            // With more physical address bits the firmware puts the BARs of virtual functions
            // where QEMU maps their low halves only.
            Self::Emulation => {
                &["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,phys-bits=36"]
            }
        }
    }
}

/// Starts the machine; its agent's port is connected to `socket`, its console goes to `console`.
pub(super) fn start(artefacts: &Artefacts, socket: &Path, console: &Path) -> Result<Child> {
    fs::write(console, "").context(|| writing(console))?;
    // The machine ends with the lab however that ends, and gets no keyboard signals of its own.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]);
    command.args([
        "-machine",
        "q35,kernel-irqchip=split",
        "-smp",
        "2",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(Nesting::here().arguments()).args(["-m", &MEMORY_MIB.to_string()]);
    command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    command
        .args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
    command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    command.args(["-chardev", &format!("socket,id=agent,path={}", socket.display())]);
    command.args(["-device", &format!("virtserialport,chardev=agent,name={PORT}")]);
    command.args(["-serial", &format!("file:{}", console.display())]);
    for nic in nics() {
        command.args(["-device", &nic]);
    }
    // One hub joins the two NICs: they are two hosts' NICs on one switch.
    for index in 0..2 {
        command.args(["-netdev", &format!("hubport,id=n{index},hubid=0")]);
    }
    command.arg("-kernel").arg(artefacts.kernel.vmlinux());
    command.arg("-initrd").arg(&artefacts.host_initrd);
    command.args(["-append", &parameters(artefacts)]);
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::OpenOptions::new().append(true).open(console).context(|| writing(console))?);
    command.spawn().context(|| "cannot start QEMU".into())
}

/// A root port each, because a physical function and its virtual ones share a bus number.
fn nics() -> Vec<String> {
    let port = |index| {
        format!("pcie-root-port,id=rp{index},slot={},mem-reserve=32M,pref32-reserve=32M", index + 1)
    };
    let nic =
        |index| format!("igb,bus=rp{index},netdev=n{index},mac=52:54:00:07:00:0{index},romfile=");
    (0..2).flat_map(|index| [port(index), nic(index)]).collect()
}

fn parameters(artefacts: &Artefacts) -> String {
    format!(
        "console=ttyS0 panic=-1 mitigations=off intel_iommu=on iommu=pt lab.kernel={} lab.modules={}",
        artefacts.kernel.version,
        artefacts.kernel.root.display(),
    )
}
