//! What the lab runs: uvmm itself, kernels, and the file systems they start from.
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};
use crate::host::Bytes;
use crate::kernel::{self, Kernel};
use crate::{cache, initramfs, install};

/// Everything that a lab host needs to start and its guests are made of.
#[derive(Debug)]
pub struct Artefacts {
    /// The built `uvmm`.
    pub uvmm: PathBuf,
    /// The kernel of the lab host and of its guests.
    pub kernel: Kernel,
    /// Another version or flavour, to show that guests need not be the lab's own.
    pub other_kernel: Kernel,
    /// What a guest starts from.
    pub guest_initrd: PathBuf,
    /// What the lab host starts from.
    pub host_initrd: PathBuf,
}

impl Artefacts {
    /// Installs, fetches and builds what is missing; `UVMM`, if it is set, stands for another build.
    ///
    /// # Errors
    /// If something cannot be had; the error says what and why.
    pub fn prepare(profile: Profile) -> Result<Self> {
        let _others_wait = cache::lock()?;
        install::programs()?;
        let [kernel, other_kernel] = kernel::all()?;
        let guest_initrd = initramfs::guest(&kernel, &other_kernel)?;
        let host_initrd = initramfs::host(&kernel)?;
        let uvmm = uvmm(profile)?;
        Ok(Self { uvmm, kernel, other_kernel, guest_initrd, host_initrd })
    }

    /// The part of a command's environment that is known before the lab host runs.
    pub(crate) fn environment(&self) -> Vec<(Bytes, Bytes)> {
        let known: [(&str, &Path); 5] = [
            ("UVMM", &self.uvmm),
            ("GUEST_KERNEL", &self.kernel.bzimage()),
            ("GUEST_INITRD", &self.guest_initrd),
            ("GUEST_VMLINUX", &self.kernel.vmlinux()),
            ("GUEST_OTHER_KERNEL", &self.other_kernel.bzimage()),
        ];
        let pair = |(name, value): (&str, &Path)| {
            (OsString::from(name).into(), value.as_os_str().to_owned().into())
        };
        known.into_iter().map(pair).collect()
    }
}

/// Cargo, for this workspace whatever the working directory is.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Where this workspace lies.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// How `uvmm` is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As users run it, for measurements.
    Release,
    /// In less time, for tests.
    Quick,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Quick => "quick",
        }
    }
}

/// The built `uvmm`; `UVMM`, if it is set, stands for another build.
///
/// # Errors
/// If it does not build.
pub fn uvmm(profile: Profile) -> Result<PathBuf> {
    env::var_os("UVMM").map_or_else(|| build_uvmm(profile.name()), |given| Ok(given.into()))
}

/// Cargo's own messages are shown only if it takes or fails.
fn build_uvmm(profile: &str) -> Result<PathBuf> {
    let target = cache::target()?;
    let mut command = cargo();
    command.args(["build", "--quiet", "--profile", profile, "--package", "vmm", "--bin", "uvmm"]);
    command.arg("--target-dir").arg(&target).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().context(|| "cannot run cargo".into())?;
    if !status.success() {
        return Err(Error::Unsupported(
            "uvmm does not build: see the compiler's messages above".into(),
        ));
    }
    Ok(target.join(profile).join("uvmm"))
}
