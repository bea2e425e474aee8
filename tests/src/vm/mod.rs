//! Guests run by `uvmm`, driven the way a user drives them: by the command line and the serial line.
mod moving;
mod report;
mod serial;
mod work;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub use report::{Device, Report};
use serde_json::Value;
pub use serial::Serial;
use tempfile::TempDir;

use crate::error::{Context, Error, Result, reading, writing};
use crate::program;

/// How long a Linux guest may take to boot where everything is emulated and others compete.
pub const BOOT: Duration = Duration::from_secs(120);
/// How long a short command in a guest, or of uvmm, may take.
pub const SHORT: Duration = Duration::from_secs(60);
/// How long nobody asks `uvmm` after it has said something else than is waited for: each time is a
/// process, which competes with what is waited for.
const ASKING: Duration = Duration::from_millis(100);
/// The command line of a Linux guest that says what it does on its serial line.
pub const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 quiet";

/// A host for guests: `uvmm` with a runtime directory of its own.
#[derive(Debug)]
pub struct Uvmm {
    binary: PathBuf,
    dir: TempDir,
}

/// A running `uvmm run`. Dropped, it is killed.
#[derive(Debug)]
pub struct Vm {
    /// What `--vm` calls it.
    pub name: String,
    /// Its serial line.
    pub serial: Serial,
    process: Child,
    errors: PathBuf,
}

impl Uvmm {
    /// A host that uses the `uvmm` that the environment names.
    ///
    /// # Errors
    /// If `UVMM` is not set or there is no room for files.
    pub fn new() -> Result<Self> {
        Self::of(variable("UVMM")?.into())
    }

    /// A host that uses the program at `binary`.
    ///
    /// # Errors
    /// If there is no room for files.
    pub fn of(binary: PathBuf) -> Result<Self> {
        let dir = tempfile::tempdir().context(|| "cannot create a temporary directory".into())?;
        Ok(Self { binary, dir })
    }

    /// A directory for files of a test.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where its VMs are known by name; uvmm makes it.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// `uvmm` with `arguments`, ready to be started.
    pub fn command(&self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments.into_iter().map(Into::into)).stdin(Stdio::null());
        command.env("UVMM_RUNTIME_DIR", self.runtime_dir());
        command.env("UVMM_STATE_DIR", self.dir.path().join("state"));
        command
    }

    /// Starts a Linux guest: `name`, from kernel and initrd, with further `arguments`.
    ///
    /// # Errors
    /// If uvmm cannot be started or ends at once.
    pub fn linux(&self, name: &str, kernel: &Path, arguments: &[&str]) -> Result<Vm> {
        self.linux_told(name, kernel, CMDLINE, arguments)
    }

    /// Starts the [`own_kernel`] as `guest`, with `more` on its command line, and waits until it takes
    /// commands.
    ///
    /// # Errors
    /// If uvmm cannot be started or the guest does not boot.
    pub fn guest(&self, more: &str, arguments: &[&str]) -> Result<Vm> {
        let arguments = [&["--memory", "256M"], arguments].concat();
        let mut vm =
            self.linux_told("guest", &own_kernel()?, &format!("{CMDLINE} {more}"), &arguments)?;
        vm.booted()?;
        Ok(vm)
    }

    /// [`Uvmm::linux`] with another command line than [`CMDLINE`].
    ///
    /// # Errors
    /// As there.
    pub fn linux_told(
        &self,
        name: &str,
        kernel: &Path,
        cmdline: &str,
        arguments: &[&str],
    ) -> Result<Vm> {
        let mut all = vec![OsString::from("--kernel"), kernel.into(), "--initrd".into()];
        all.extend([variable("GUEST_INITRD")?, "--cmdline".into(), cmdline.into()]);
        all.extend(arguments.iter().map(OsString::from));
        self.run(name, all)
    }

    /// Starts a VM that waits for a guest to be migrated here; gives it and its address.
    ///
    /// # Errors
    /// If uvmm cannot be started or ends at once.
    pub fn incoming(&self, name: &str) -> Result<(Vm, String)> {
        self.incoming_with(name, &[])
    }

    /// As [`Uvmm::incoming`], with more on the command line of `uvmm run`.
    ///
    /// # Errors
    /// As there.
    pub fn incoming_with(&self, name: &str, arguments: &[&str]) -> Result<(Vm, String)> {
        let address = free_address()?;
        let mut all = vec![OsString::from("--incoming"), format!("tcp:{address}").into()];
        all.extend(arguments.iter().map(OsString::from));
        let vm = self.run(name, all)?;
        self.until_it_answers(&vm.name)?;
        Ok((vm, address))
    }

    /// Starts `uvmm run` with a serial line that the test talks to.
    ///
    /// # Errors
    /// If uvmm cannot be started or ends before its serial line is there.
    pub fn run(&self, name: &str, arguments: Vec<OsString>) -> Result<Vm> {
        let socket = self.dir.path().join(format!("{name}.serial"));
        let errors = self.dir.path().join(format!("{name}.stderr"));
        let stderr = fs::File::create(&errors).context(|| writing(&errors))?;
        let mut command = self.command(["run"]);
        command
            .args(["--name", name])
            .args(arguments)
            .arg("--serial")
            .arg(format!("socket={}", socket.display()));
        let mut process = command
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .context(|| format!("cannot run {}", self.binary.display()))?;
        let deadline = Instant::now() + SHORT;
        let serial = loop {
            match Serial::connect(&socket) {
                Ok(serial) => break serial,
                Err(_) if Instant::now() < deadline => {}
                Err(error) => {
                    drop((process.kill(), process.wait()));
                    return Err(error).context(|| format!("{name} has no serial line"));
                }
            }
            if let Some(status) = process.try_wait().context(|| "cannot wait for uvmm".into())? {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                return Err(Error::Guest(format!("uvmm run ended with {status}: {}", said.trim())));
            }
            thread::sleep(Duration::from_millis(20));
        };
        Ok(Vm { name: name.into(), serial, process, errors })
    }

    /// Runs `uvmm` with `arguments` to its end; gives the status, stdout and stderr.
    ///
    /// # Errors
    /// If it cannot be started or does not end in time.
    pub fn call(&self, arguments: &[&str]) -> Result<(ExitStatus, String, String)> {
        let mut command = self.command(arguments.iter().copied());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        report::finish(child.context(|| "cannot run uvmm".into())?, SHORT)
    }

    /// What `uvmm info --json` says of the VM called `name`.
    ///
    /// # Errors
    /// If it says nothing, or no JSON.
    pub fn info(&self, name: &str) -> Result<Value> {
        let (_, said, errors) = self.call(&["info", "--vm", name, "--json"])?;
        let not_json = |error| Error::Guest(format!("no JSON in {said:?} ({error}): {errors}"));
        serde_json::from_str(&said).map_err(not_json)
    }

    /// Waits until `condition` holds of what `uvmm info --json` says of the VM called `name`.
    ///
    /// # Errors
    /// As [`Uvmm::info`]; or if it does not hold in time.
    pub fn until(&self, name: &str, condition: impl Fn(&Value) -> bool) -> Result<()> {
        let deadline = Instant::now() + SHORT;
        loop {
            let info = self.info(name)?;
            if condition(&info) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout(format!("{name} stays like this: {info}")));
            }
            thread::sleep(ASKING);
        }
    }

    /// Waits until a part of the memory of the VM called `name` is at its destination.
    ///
    /// # Errors
    /// As [`Uvmm::until`].
    pub fn until_it_copies(&self, name: &str) -> Result<()> {
        self.until(name, |info| info["migration"]["bytes_sent"].as_u64() > Some(1 << 20))
    }

    /// How many accesses to memory uvmm had to answer for the guest called `name` so far.
    ///
    /// # Errors
    /// If there is no such VM.
    pub fn mmio_exits(&self, name: &str) -> Result<u64> {
        let info = self.info(name)?;
        let count = info["counters"]["exits-mmio"].as_u64();
        count.ok_or_else(|| Error::Guest(format!("no count of exits in {info}")))
    }

    /// Waits until the VM called `name` answers.
    pub(crate) fn until_it_answers(&self, name: &str) -> Result<()> {
        let deadline = Instant::now() + SHORT;
        loop {
            let (status, _, errors) = self.call(&["info", "--vm", name])?;
            if status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout(format!("{name} does not answer: {}", errors.trim())));
            }
            thread::sleep(ASKING);
        }
    }
}

impl Vm {
    /// Waits until the guest has booted and takes commands.
    ///
    /// # Errors
    /// If it does not say so in time.
    pub fn booted(&mut self) -> Result<()> {
        self.serial.expect("uvmm-guest: init", BOOT)?;
        self.serial.expect("uvmm-guest: ready", BOOT)?;
        self.serial.expect("\n", SHORT).map(drop)
    }

    /// Runs one line in the guest's shell; gives what it printed and its status.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn shell(&mut self, line: &str) -> Result<(String, u32)> {
        self.serial.send(line)?;
        let printed = self.serial.expect("uvmm-guest: status ", SHORT)?;
        let status = self.serial.expect("\n", SHORT)?;
        let status = status.trim().parse();
        let status = status.map_err(|_| Error::Guest("a status is no number".into()))?;
        Ok((printed.replace('\r', ""), status))
    }

    /// What a line that must succeed prints in the guest's shell, with all white space as blanks.
    ///
    /// # Errors
    /// If it does not end in time, or fails.
    pub fn says(&mut self, line: &str) -> Result<String> {
        match self.shell(line)? {
            (printed, 0) => Ok(printed.split_whitespace().collect::<Vec<_>>().join(" ")),
            (printed, status) => Err(Error::Guest(format!("{line}: status {status}: {printed}"))),
        }
    }

    /// Waits until `condition` holds in the guest's shell, 20 seconds at most.
    ///
    /// # Errors
    /// If it does not hold by then.
    pub fn until(&mut self, condition: &str) -> Result<()> {
        let tries = "for i in $(seq 200)";
        self.says(&format!("{tries}; do {condition} && exit 0; sleep 0.1; done; exit 1")).map(drop)
    }

    /// The process that runs it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Ends the process at once, as a crash would.
    pub fn kill(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }

    /// Whether its process still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// What uvmm said on stderr so far.
    ///
    /// # Errors
    /// If the file that it goes to cannot be read.
    pub fn errors(&self) -> Result<String> {
        fs::read_to_string(&self.errors).context(|| reading(&self.errors))
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let ended = report::wait(&mut self.process, limit)?;
        ended.ok_or_else(|| {
            let shown = program::last_lines(&self.serial.everything(), 10);
            Error::Timeout(format!(
                "{} did not end in {limit:.0?}; its last lines:\n{shown}",
                self.name
            ))
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if thread::panicking() {
            let lines = program::last_lines(&self.serial.everything(), 30);
            let errors = self.errors().unwrap_or_default();
            eprintln!("--- serial line of {}:\n{lines}\n--- its stderr:\n{errors}---", self.name);
        }
        self.kill();
    }
}

/// The lab's own Linux as it is in memory. A bzImage takes seconds to unpack itself where all is
/// emulated, and leaves more memory to be moved behind.
///
/// # Errors
/// As [`variable`].
pub fn own_kernel() -> Result<PathBuf> {
    variable("GUEST_VMLINUX").map(PathBuf::from)
}

/// A variable of the lab's environment.
///
/// # Errors
/// If it is not set: then this is not the lab host.
pub fn variable(name: &str) -> Result<OsString> {
    std::env::var_os(name)
        .ok_or_else(|| Error::Unsupported(format!("{name} is not set: this runs in the lab")))
}

/// A [`variable`] that is text.
///
/// # Errors
/// If it is not set, or is not UTF-8.
pub fn text(name: &str) -> Result<String> {
    let not_text = |_| Error::Unsupported(format!("{name} is not UTF-8"));
    variable(name)?.into_string().map_err(not_text)
}

/// An address of this host that nobody listens at.
///
/// # Errors
/// If the host has none.
pub fn free_address() -> Result<String> {
    let address = || -> io::Result<String> {
        Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.to_string())
    };
    address().context(|| "cannot find a free port".into())
}
