//! The guest driver, built for the kernels of the lab's guests as a user builds it.
//!
//! What it is built against are Debian's own packages, unpacked into the cache and not installed.
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result, reading, writing};
use crate::kernel::Kernel;
use crate::{cache, install, program};

/// The module's file.
pub const MODULE: &str = "uvmm_bridge.ko";

/// The module for `kernel`, without what only a debugger needs.
///
/// # Errors
/// If the kernel's headers are neither unpacked yet nor to be had, or it does not build: a warning
/// of the compiler is an error.
pub fn module(kernel: &Kernel) -> Result<Vec<u8>> {
    let sources = sources()?;
    let headers = headers(kernel)?;
    let (module, built_from) = (headers.join(MODULE), headers.join("built-from"));
    let written = format!("{sources:?}").into_bytes();
    if !fs::read(&built_from).is_ok_and(|old| old == written) {
        let scratch = tempfile::tempdir_in(&headers).context(|| writing(&headers))?;
        for (name, content) in &sources {
            let path = scratch.path().join(name);
            fs::write(&path, content).context(|| writing(&path))?;
        }
        build(scratch.path(), &tree(&headers, kernel)?)?;
        let built = scratch.path().join(MODULE);
        fs::rename(&built, &module).context(|| writing(&module))?;
        cache::write(&built_from, &written)?;
    }
    fs::read(&module).context(|| reading(&module))
}

/// Its files by name, in order.
fn sources() -> Result<Vec<(OsString, String)>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest-driver");
    let mut sources = Vec::new();
    for entry in fs::read_dir(&dir).context(|| reading(&dir))? {
        let path = entry.context(|| reading(&dir))?.path();
        let name = path.file_name().unwrap_or_default().to_owned();
        let text = path.extension().is_some_and(|end| end == "c" || end == "h");
        if text || name == "Kbuild" || name == "Makefile" {
            let content = fs::read_to_string(&path).context(|| reading(&path))?;
            sources.push((name, content));
        }
    }
    sources.sort();
    Ok(sources)
}

fn build(dir: &Path, tree: &Path) -> Result<()> {
    let mut kdir = OsString::from("KDIR=");
    kdir.push(tree);
    let mut make = Command::new("make");
    make.arg("-C").arg(dir).arg(kdir);
    // Type information for tracing needs one more tool, and nobody traces it here.
    make.args(["CC=gcc", "KCFLAGS=-Werror", "CONFIG_DEBUG_INFO_BTF_MODULES="]);
    program::run(&mut make)?;
    program::run(Command::new("strip").arg("--strip-debug").arg(dir.join(MODULE))).map(drop)
}

/// The directory that holds the headers of `kernel`.
fn headers(kernel: &Kernel) -> Result<PathBuf> {
    let version = &kernel.version;
    let dir = cache::dir()?.join("headers");
    let root = dir.join(version);
    if root.exists() {
        return Ok(root);
    }
    eprintln!("lab: fetching the headers of Linux {version} for the guest driver (unpacked)");
    let half = dir.join(format!("{version}.half"));
    if half.exists() {
        fs::remove_dir_all(&half).context(|| writing(&half))?;
    }
    let package = format!("linux-headers-{version}");
    let gone = |error| {
        Error::Unsupported(format!(
            "{error}: if Debian has a newer kernel by now, remove {} to have that one",
            dir.with_file_name("kernels").display()
        ))
    };
    let needs = install::dependencies(&package).map_err(gone)?;
    let needs = needs
        .iter()
        .filter(|name| name.starts_with("linux-kbuild-") || name.starts_with("linux-headers-"));
    for name in needs.chain([&package]) {
        install::unpack(name, &half)?;
    }
    fs::rename(&half, &root).context(|| writing(&root))?;
    Ok(root)
}

/// The directory to build against. Its Makefile says where the other part of it was installed,
/// which is elsewhere now.
fn tree(headers: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let sources = headers.join("usr/src");
    let tree = sources.join(format!("linux-headers-{}", kernel.version));
    let mut common = fs::read_dir(&sources)
        .context(|| reading(&sources))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().contains("-common"));
    let common = common.next().ok_or_else(|| {
        Error::Unsupported(format!("{} has no headers for all machines", sources.display()))
    })?;
    let makefile = format!("include {}/Makefile\n", common.display());
    cache::write(&tree.join("Makefile"), makefile.as_bytes())?;
    Ok(tree)
}
