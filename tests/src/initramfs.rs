//! The initial RAM file systems of the lab host and of its guests.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::error::{Context, Error, Result, reading, writing};
use crate::guest_driver::{self, MODULE};
use crate::kernel::Kernel;
use crate::{cache, install, program};

/// What the lab host needs, much of it before it sees the root of this machine.
const HOST_MODULES: [&str; 10] = [
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_console",
    "virtio_net",
    "igb",
    "vfio_pci",
    // Not one that vfio_pci needs, but one that modprobe loads after it.
    "vfio_iommu_type1",
    "kvm_amd",
    "kvm_intel",
];
/// Drivers that a guest may be asked to load, in `/modules`.
const GUEST_MODULES: [&str; 8] = [
    "button",
    "evdev",
    "igbvf",
    "e1000",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
];

const GUEST_INIT: &str = include_str!("guest/init.sh");
const HOST_INIT: &str = include_str!("host/init.sh");
const GUEST_LOAD: &str = include_str!("bin/guest-load.rs");

/// Makes the file system that a guest starts from: with the modules of `kernel`, and what it takes
/// to migrate with a device for `other` in a directory of that version.
///
/// # Errors
/// If a part of it cannot be made.
pub fn guest(kernel: &Kernel, other: &Kernel) -> Result<PathBuf> {
    let load = guest_load()?;
    let load = fs::read(&load).context(|| reading(&load))?;
    let mut files =
        vec![("init".to_owned(), GUEST_INIT.into()), ("bin/guest-load".to_owned(), load)];
    files.extend(modules(kernel, &GUEST_MODULES)?);
    files.push((format!("modules/{MODULE}"), guest_driver::module(kernel)?));
    let mut others = other.modules(&["igbvf"])?;
    others.push((MODULE.to_owned(), guest_driver::module(other)?));
    let version = &other.version;
    files.extend(others.into_iter().map(|(name, it)| (format!("modules/{version}/{name}"), it)));
    build("guest", files)
}

/// Makes the file system that the lab host starts from.
///
/// # Errors
/// If a part of it cannot be made.
pub fn host(kernel: &Kernel) -> Result<PathBuf> {
    let mut files = vec![("init".to_owned(), HOST_INIT.into())];
    let modules = modules(kernel, &HOST_MODULES)?;
    let order = modules.iter().map(|(path, _)| format!("/{path}\n")).collect::<String>();
    files.push(("modules/order".into(), order.into()));
    // busybox has an `ip` too, but it knows nothing of virtual functions.
    let ip = program::find("ip")
        .ok_or_else(|| Error::Unsupported("iproute2 is not installed".into()))?;
    files.push(("full-ip".into(), fs::read(&ip).context(|| reading(&ip))?));
    files.extend(libraries(&ip)?);
    files.extend(modules);
    build("host", files)
}

/// The shared libraries that `program` needs, at the paths where it looks for them.
fn libraries(program: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let listing = program::run(Command::new("ldd").arg(program))?;
    let paths = listing.split_whitespace().filter(|word| word.starts_with('/'));
    paths
        .map(|path| {
            let content = fs::read(path).context(|| reading(Path::new(path)))?;
            Ok((path.trim_start_matches('/').to_owned(), content))
        })
        .collect()
}

fn modules(kernel: &Kernel, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let modules = kernel.modules(names)?;
    Ok(modules.into_iter().map(|(name, content)| (format!("modules/{name}"), content)).collect())
}

/// Archives `files`, a static busybox and the directories they need; the same parts give the same
/// bytes, so that what runs already is not replaced for nothing.
fn build(name: &str, mut files: Vec<(String, Vec<u8>)>) -> Result<PathBuf> {
    let busybox = busybox()?;
    files.push(("bin/busybox".into(), fs::read(&busybox).context(|| reading(&busybox))?));
    let path = cache::dir()?.join(format!("{name}.cpio"));
    let archive = || -> std::io::Result<Vec<u8>> {
        let mut archive = Archive::new(Vec::new());
        for dir in directories(&files) {
            archive.directory(&dir)?;
        }
        archive.device("dev/console", (5, 1))?;
        archive.link("bin/sh", "busybox")?;
        for (path, content) in &files {
            archive.file(path, 0o755, content)?;
        }
        archive.finish()
    };
    let bytes = archive().context(|| format!("cannot archive {}", path.display()))?;
    if !fs::read(&path).is_ok_and(|old| old == bytes) {
        cache::write(&path, &bytes)?;
    }
    Ok(path)
}

/// The directories that mount points and `files` lie in, parents first.
fn directories(files: &[(String, Vec<u8>)]) -> BTreeSet<String> {
    let points = ["bin", "dev", "proc", "root", "run", "sys", "tmp"];
    let parents = files.iter().flat_map(|(path, _)| Path::new(path).ancestors().skip(1));
    let parents =
        parents.filter(|path| *path != Path::new("")).map(|path| path.display().to_string());
    points.into_iter().map(str::to_owned).chain(parents).collect()
}

fn busybox() -> Result<PathBuf> {
    let dir = cache::dir()?.join("busybox");
    let path = ["bin/busybox", "usr/bin/busybox"].map(|path| dir.join(path));
    if let Some(found) = path.iter().find(|path| path.exists()) {
        return Ok(found.clone());
    }
    eprintln!(
        "lab: fetching busybox-static for the initial file systems (unpacked, not installed)"
    );
    install::unpack("busybox-static", &dir)?;
    let found = path.into_iter().find(|path| path.exists());
    found.ok_or_else(|| Error::Unsupported("busybox-static holds no busybox".into()))
}

/// Builds the workload of the guest as one static file, which needs nothing else in the guest.
fn guest_load() -> Result<PathBuf> {
    let dir = cache::dir()?;
    let (source, binary) = (dir.join("guest-load.rs"), dir.join("guest-load"));
    if binary.exists() && fs::read(&source).is_ok_and(|built| built == GUEST_LOAD.as_bytes()) {
        return Ok(binary);
    }
    let scratch = tempfile::tempdir_in(&dir).context(|| writing(&dir))?;
    let (new_source, new_binary) =
        (scratch.path().join("guest-load.rs"), scratch.path().join("out"));
    fs::write(&new_source, GUEST_LOAD).context(|| writing(&new_source))?;
    program::run(
        Command::new("rustc")
            // Every guest unpacks it: what only a debugger needs is most of it.
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static"])
            .args(["-C", "strip=symbols", "-o"])
            .args([&new_binary, &new_source]),
    )?;
    fs::rename(&new_binary, &binary).context(|| writing(&binary))?;
    fs::rename(&new_source, &source).context(|| writing(&source))?;
    Ok(binary)
}
