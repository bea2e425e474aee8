//! Installs what the lab needs and the machine does not have.
//!
//! Debian packages come by apt, as root or through sudo, and only when something is missing: on a
//! machine that has everything, apt is not called at all. Packages that are only looked into (the
//! kernels, a static busybox) are unpacked below the cache and never installed: see [`unpack`].
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result, reading, writing};
use crate::program;

/// The oldest QEMU with `igb`, the NIC whose virtual functions the lab passes through.
const QEMU_AT_LEAST: u32 = 8;
const QEMU: &str = "qemu-system-x86_64";
const BACKPORTS: &str = "/etc/apt/sources.list.d/uvmm-lab-backports.sources";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Programs that the lab calls: name, package, reason.
const PROGRAMS: [(&str, &str, &str); 8] = [
    ("modprobe", "kmod", "loads KVM and VFIO in the lab host"),
    ("ip", "iproute2", "sets up the NICs of the lab host"),
    ("ethtool", "ethtool", "looks at the NICs of the lab host"),
    ("ping", "iputils-ping", "shows that a guest is alive while it migrates"),
    ("xz", "xz-utils", "unpacks kernels and their modules"),
    ("zstd", "zstd", "unpacks kernels and their modules"),
    ("make", "make", "builds the guest driver"),
    ("gcc", "gcc", "builds the guest driver"),
];

/// Makes sure that every program the lab calls is there.
///
/// # Errors
/// If something is missing and cannot be installed; the error names the command that failed.
pub fn programs() -> Result<()> {
    let mut packages = Vec::new();
    for (name, package, why) in PROGRAMS {
        if program::find(name).is_none() {
            eprintln!("lab: installing {package}: {name} {why}");
            packages.push(package);
        }
    }
    let qemu_is_old = qemu_major().is_none_or(|major| major < QEMU_AT_LEAST);
    if packages.is_empty() && !qemu_is_old {
        return Ok(());
    }
    update()?;
    if !packages.is_empty() {
        apt(&[&["install", "--no-install-recommends"], packages.as_slice()].concat())?;
    }
    if qemu_is_old {
        eprintln!(
            "lab: installing qemu-system-x86: QEMU {QEMU_AT_LEAST} or newer emulates the lab host, \
             a machine with KVM, an IOMMU and SR-IOV NICs"
        );
        install_qemu()?;
    }
    Ok(())
}

/// Downloads the newest `package` and unpacks it into `dir` without installing it.
///
/// # Errors
/// If apt knows no such package or cannot fetch it.
pub fn unpack(package: &str, dir: &Path) -> Result<()> {
    let parent = dir.parent().unwrap_or(dir);
    fs::create_dir_all(parent).context(|| writing(parent))?;
    let download = tempfile::tempdir_in(parent).context(|| writing(parent))?;
    let fetch = || {
        program::run(
            Command::new("apt-get").args(["-qq", "download", package]).current_dir(download.path()),
        )
    };
    if fetch().is_err() {
        update()?;
        fetch()?;
    }
    let entry = fs::read_dir(download.path())
        .context(|| reading(download.path()))?
        .next()
        .ok_or_else(|| Error::Unsupported(format!("apt-get download {package} left no file")))?
        .context(|| reading(download.path()))?;
    program::run(Command::new("dpkg").arg("-x").arg(entry.path()).arg(dir)).map(drop)
}

/// The packages that `package` depends on, as apt knows them.
///
/// # Errors
/// If apt does not know the package even after an update of its lists.
pub fn dependencies(package: &str) -> Result<Vec<String>> {
    let ask = || program::run(Command::new("apt-cache").args(["depends", "--important", package]));
    let mut answer = ask();
    if answer.as_ref().map_or(true, String::is_empty) {
        update()?;
        answer = ask();
    }
    let names = answer?
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .collect::<Vec<_>>();
    if names.is_empty() {
        return Err(Error::Unsupported(format!(
            "apt knows no package {package} with dependencies"
        )));
    }
    Ok(names)
}

fn qemu_major() -> Option<u32> {
    let output = Command::new(QEMU).arg("--version").stdin(Stdio::null()).output().ok()?;
    major_version(&String::from_utf8_lossy(&output.stdout))
}

/// `QEMU emulator version 10.0.2 (Debian …)` gives 10.
fn major_version(text: &str) -> Option<u32> {
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

fn install_qemu() -> Result<()> {
    let install = ["install", "--no-install-recommends"];
    let offered = program::run(Command::new("apt-cache").args(["policy", "qemu-system-x86"]))?;
    if candidate_major(&offered).is_some_and(|major| major >= QEMU_AT_LEAST) {
        return apt(&[&install[..], &["qemu-system-x86"]].concat());
    }
    let release =
        fs::read_to_string("/etc/os-release").context(|| reading(Path::new("/etc/os-release")))?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .ok_or_else(|| Error::Unsupported("/etc/os-release names no Debian release".into()))?;
    let suite = format!("{codename}-backports");
    add_backports(codename, &suite)?;
    update()?;
    apt(&[&install[..], &["-t", &suite, "qemu-system-x86"]].concat())
}

/// `  Candidate: 1:10.0.2+ds-2` gives 10.
fn candidate_major(policy: &str) -> Option<u32> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    let version = version.split_once(':').map_or(version, |(_epoch, rest)| rest);
    version.split('.').next()?.parse().ok()
}

/// Adds the backports suite from the archive that this machine already installs from.
fn add_backports(codename: &str, suite: &str) -> Result<()> {
    let format = "$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)";
    let targets = program::run(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    let archive = archive_of(codename, &targets).ok_or_else(|| {
        Error::Unsupported(format!(
            "apt has no source for the main component of {codename}: add one, then run this again"
        ))
    })?;
    let signed_by =
        if Path::new(KEYRING).exists() { format!("Signed-By: {KEYRING}\n") } else { String::new() };
    let source =
        format!("Types: deb\nURIs: {archive}\nSuites: {suite}\nComponents: main\n{signed_by}");
    eprintln!("lab: adding {BACKPORTS}: this release's own QEMU is older than {QEMU_AT_LEAST}");
    program::feed(as_root("tee").arg(BACKPORTS).stdout(Stdio::null()), source.as_bytes())
}

/// Finds the archive in lines of `Packages <uri> <release> <component>`.
fn archive_of<'a>(codename: &str, targets: &'a str) -> Option<&'a str> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (kind, uri) = (words.next()?, words.next()?);
        let (release, component) = (words.next()?, words.next()?);
        (kind == "Packages" && (release == codename || release == "stable") && component == "main")
            .then_some(uri)
    })
}

fn update() -> Result<()> {
    apt(&["update"])
}

/// Runs apt-get as root, quietly; its output is shown only if it fails.
fn apt(arguments: &[&str]) -> Result<()> {
    let mut command = as_root("env");
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-qq",
        "-y",
        "-o",
        "Dpkg::Use-Pty=0",
    ]);
    program::run(command.args(arguments)).map(drop)
}

fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_and_apt_print_them() {
        assert_eq!(
            major_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n"),
            Some(10)
        );
        assert_eq!(major_version("what?"), None);
        assert_eq!(
            candidate_major("x:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n"),
            Some(7)
        );
        assert_eq!(candidate_major("x:\n  Candidate: (none)\n"), None);
    }

    #[test]
    fn the_archive_is_the_one_the_release_itself_comes_from() {
        let targets = "DEP-11 http://a/ bookworm main\n\
                       Packages http://security/ bookworm-security main\n\
                       Packages http://archive/ bookworm main\n";
        assert_eq!(archive_of("bookworm", targets), Some("http://archive/"));
        assert_eq!(archive_of("trixie", targets), None);
    }
}
