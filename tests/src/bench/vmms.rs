//! The VMMs that are compared, each with the tiny guest.
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::pulse::{self, Place, SEED, Seen};
use super::qmp::Qmp;
use crate::error::{Context, Error, Result, reading, writing};
use crate::program;
use crate::vm::{Report, Uvmm, free_address};

/// How long the guest may take to fill its memory, and a VMM to get ready.
const READY: Duration = Duration::from_secs(120);
/// How long a migration may take.
const MIGRATION: Duration = Duration::from_secs(120);

/// Which VMM, and over how many connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vmm {
    Uvmm(usize),
    /// The same, with checksums of all memory.
    UvmmChecked(usize),
    /// The same as the first, from KVM's dirty rings instead of its log.
    UvmmRing(usize),
    /// One connection and one thread.
    Qemu,
    /// With this many channels.
    QemuMultifd(usize),
}

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) mib: u64,
    /// Of how many pages in a hundred there is something to send.
    pub(super) percent: u32,
    /// How much it rewrites, as fast as it can.
    pub(super) rewritten_mib: u64,
}

/// What a migration took.
#[derive(Clone, Debug)]
pub(super) struct Journey {
    pub(super) seconds: f64,
    /// Not a number if it came to none.
    pub(super) downtime_ms: f64,
    pub(super) growth_mib: f64,
    pub(super) end: End,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// As uvmm tells.
    Moved(String),
    /// QEMU tells no more than that.
    Completed,
    /// The guest was still where it was.
    NotWithin(Duration),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Moved(outcome) => f.write_str(outcome),
            Self::Completed => f.write_str("completed"),
            Self::NotWithin(limit) => write!(f, "not within {limit:.0?}"),
        }
    }
}

/// What starts VMMs.
pub(super) struct Stand {
    uvmm: Uvmm,
    guest: PathBuf,
    dir: TempDir,
}

/// A guest that goes from process to process of this host.
pub(super) struct Nomad {
    running: Running,
    /// How many processes it was in before.
    moves: usize,
    mib: u64,
}

/// What a hand-over took, as uvmm reports it: its memory is in both processes, so who looks from
/// outside cannot tell where it runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handed {
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
}

/// A VMM that runs. Dropped, it is killed.
struct Running {
    process: Child,
    console: PathBuf,
    qmp: Option<Qmp>,
}

impl Drop for Running {
    fn drop(&mut self) {
        drop((self.process.kill(), self.process.wait()));
    }
}

impl Stand {
    pub(super) fn new(uvmm: PathBuf) -> Result<Self> {
        let dir = tempfile::tempdir().context(|| "cannot create a temporary directory".into())?;
        let guest = dir.path().join("tiny-guest");
        fs::write(&guest, resources::TINY_GUEST).context(|| writing(&guest))?;
        Ok(Self { uvmm: Uvmm::of(uvmm)?, guest, dir })
    }

    /// Moves a guest that is under `load`; `beside` runs first, while the guest works.
    pub(super) fn migrate<T>(
        &self,
        vmm: Vmm,
        load: Load,
        beside: impl FnOnce() -> Result<T>,
    ) -> Result<(Journey, T)> {
        let mut source = self.start("here", self.source(vmm, load))?;
        source.says("rewrite ok")?;
        let address = free_address()?;
        let mut destination = self.start("there", self.destination(vmm, load, &address))?;
        self.prepare(vmm, &mut source, &mut destination, &address)?;
        let besides = beside()?;
        let pids = [source.process.id(), destination.process.id()];
        let place = Place { bytes: load.mib << 20, rewritten_mib: load.rewritten_mib };
        let ((end, seconds), seen) = pulse::watch(pids, place, || {
            let since = Instant::now();
            let end = self.go(vmm, &mut source, &address)?;
            Ok((end, since.elapsed().as_secs_f64()))
        })?;
        let Seen { downtime, growth_mib } = seen;
        let downtime_ms = match (&end, downtime) {
            (End::NotWithin(_), _) => f64::NAN,
            (_, Some(downtime)) => downtime.as_secs_f64() * 1e3,
            (_, None) => return Err(Error::Guest("the guest was not seen to run there".into())),
        };
        Ok((Journey { seconds, downtime_ms, growth_mib, end }, besides))
    }

    /// Starts a guest of `mib` that has filled a fifth of its memory.
    pub(super) fn settle(&self, mib: u64) -> Result<Nomad> {
        let mut command = self.uvmm.command(["run", "--memory", &format!("{mib}M")]);
        command.args(["--cmdline", &format!("run=fill {SEED} 20;rewrite 1 20")]);
        let running = self.start(&nomad(mib, 0), command)?;
        running.says("rewrite ok")?;
        Ok(Nomad { running, moves: 0, mib })
    }

    /// Hands `guest` over to another process, memory and all.
    pub(super) fn hand_over(&self, guest: &mut Nomad) -> Result<Handed> {
        let Nomad { mib, moves, .. } = *guest;
        let (from, to) = (nomad(mib, moves), nomad(mib, moves + 1));
        let address = format!("unix:{}", self.dir.path().join(format!("{to}.in")).display());
        let next = self.start(&to, self.uvmm.command(["run", "--incoming", &address]))?;
        let mut command = self.uvmm.command(["migrate", "--vm", &from, "--to", &address]);
        let child = command.args(["--shared-memory", "--json"]);
        let child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let report = Report::of(child.context(|| "cannot run uvmm".into())?, MIGRATION)?;
        if let Some(error) = report.error {
            return Err(Error::Guest(error));
        }
        guest.moves += 1;
        guest.running = next;
        Ok(Handed { total_ms: report.total_ms, downtime_ms: report.downtime_ms })
    }

    fn go(&self, vmm: Vmm, source: &mut Running, address: &str) -> Result<End> {
        let (streams, more) = match vmm {
            Vmm::Uvmm(streams) | Vmm::UvmmRing(streams) => (streams, None),
            Vmm::UvmmChecked(streams) => (streams, Some("--checksums")),
            Vmm::Qemu | Vmm::QemuMultifd(_) => {
                let qmp = source.qmp.as_mut().expect("QEMU has a monitor");
                let completed = qmp.migrate(&format!("tcp:{address}"), MIGRATION)?;
                return Ok(if completed { End::Completed } else { End::NotWithin(MIGRATION) });
            }
        };
        let streams = streams.to_string();
        let mut command = self.uvmm.command(["migrate", "--vm", "here", "--to", address]);
        command.args(["--streams", &streams, "--json"]).args(more);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let report = Report::of(child.context(|| "cannot run uvmm".into())?, MIGRATION)?;
        match (report.error, report.outcome) {
            (None, Some(outcome)) => Ok(End::Moved(outcome)),
            (None, None) => Err(Error::Guest("uvmm does not say how the copying ended".into())),
            (Some(error), _) => Err(Error::Guest(error)),
        }
    }

    fn source(&self, vmm: Vmm, load: Load) -> Command {
        let Load { mib, percent, rewritten_mib } = load;
        let told = format!("run=fill {SEED} {percent};rewrite {rewritten_mib} max");
        let mut command = match vmm {
            Vmm::Uvmm(_) | Vmm::UvmmChecked(_) | Vmm::UvmmRing(_) => {
                self.uvmm.command(["run", "--memory", &format!("{mib}M")])
            }
            Vmm::Qemu | Vmm::QemuMultifd(_) => self.qemu(mib),
        };
        if let Vmm::UvmmRing(_) = vmm {
            command.args(["--dirty-tracking", "ring"]);
        }
        command.args([if vmm.is_qemu() { "-append" } else { "--cmdline" }, &told]);
        command
    }

    fn destination(&self, vmm: Vmm, load: Load, address: &str) -> Command {
        if vmm.is_qemu() {
            let mut command = self.qemu(load.mib);
            command.args(["-incoming", "defer"]);
            return command;
        }
        self.uvmm.command(["run", "--incoming", &format!("tcp:{address}")])
    }

    fn qemu(&self, mib: u64) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm", "-enable-kvm", "-smp", "1", "-m", &format!("{mib}M")]);
        // A KVM that is software takes not all that it says of this register.
        command.args(["-cpu", "host,-arch-capabilities"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(&self.guest).stdin(Stdio::null());
        command
    }

    fn start(&self, name: &str, mut command: Command) -> Result<Running> {
        let is_qemu = command.get_program() == "qemu-system-x86_64";
        let file = |what: &str| self.dir.path().join(format!("{name}.{what}"));
        let (console, socket, errors) = (file("console"), file("qmp"), file("stderr"));
        drop((fs::remove_file(&socket), fs::write(&console, "")));
        if is_qemu {
            command.args(["-serial", &format!("file:{}", console.display())]);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        } else {
            command.args(["--name", name, "--serial", &format!("file={}", console.display())]);
        }
        let stderr = fs::File::create(&errors).context(|| writing(&errors))?;
        let process = command.stdout(Stdio::null()).stderr(stderr).spawn();
        let process = process.context(|| format!("cannot run {}", program::describe(&command)))?;
        let mut running = Running { process, console, qmp: None };
        if is_qemu {
            running.qmp = Some(Qmp::connect(&socket)?);
        } else {
            self.uvmm.until_it_answers(name)?;
        }
        Ok(running)
    }

    /// Gives QEMU the best that it has for the kind of migration.
    fn prepare(
        &self,
        vmm: Vmm,
        source: &mut Running,
        destination: &mut Running,
        address: &str,
    ) -> Result<()> {
        let multifd = matches!(vmm, Vmm::QemuMultifd(_));
        let mut parameters = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 300 });
        if let Vmm::QemuMultifd(streams) = vmm {
            parameters["multifd-channels"] = streams.into();
        }
        for qmp in [&mut *source, &mut *destination].into_iter().filter_map(|r| r.qmp.as_mut()) {
            let on = |capability: &str| json!({ "capability": capability, "state": true });
            let mut capabilities = vec![on("events")];
            capabilities.extend(multifd.then(|| on("multifd")));
            qmp.ask("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
            qmp.ask("migrate-set-parameters", &parameters)?;
        }
        if let Some(qmp) = &mut destination.qmp {
            qmp.ask("migrate-incoming", &json!({ "uri": format!("tcp:{address}") }))?;
        }
        Ok(())
    }
}

fn nomad(mib: u64, moves: usize) -> String {
    format!("nomad-{mib}-{moves}")
}

impl Vmm {
    fn is_qemu(self) -> bool {
        matches!(self, Self::Qemu | Self::QemuMultifd(_))
    }
}

impl Running {
    /// Waits until its guest says `text`.
    fn says(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + READY;
        while Instant::now() < deadline {
            let said = fs::read(&self.console).context(|| reading(Path::new(&self.console)))?;
            if String::from_utf8_lossy(&said).contains(text) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err(Error::Timeout(format!("the tiny guest did not say {text:?} in {READY:.0?}")))
    }
}
