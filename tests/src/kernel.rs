//! Linux kernels: Debian's own packages, unpacked into the cache and not installed.
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache;
use crate::error::{Context, Error, Result, reading, writing};
use crate::{install, program};

/// Packages of which the first that exists gives the kernel of the lab host and of its guests.
const NEWEST: [&str; 2] = ["linux-image-6.12-amd64", "linux-image-amd64"];
/// Packages of which the first that differs gives the second kernel for guests.
const OTHER: [&str; 2] = ["linux-image-amd64", "linux-image-rt-amd64"];

/// A kernel and its modules, unpacked.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub version: String,
    /// The root that holds `lib/modules/VERSION`.
    pub root: PathBuf,
}

/// The kernel of the lab host and of its guests, and another one for guests.
///
/// # Errors
/// If a package is neither unpacked yet nor to be had.
pub fn all() -> Result<[Kernel; 2]> {
    let dir = cache::dir()?.join("kernels");
    fs::create_dir_all(&dir).context(|| writing(&dir))?;
    let newest = kept(&dir, "newest", &NEWEST, None)?;
    let other = kept(&dir, "other", &OTHER, Some(&newest.version))?;
    Ok([newest, other])
}

/// The kernel that the link `name` stands for, downloaded if there is no such link.
fn kept(dir: &Path, name: &str, packages: &[&str], not: Option<&str>) -> Result<Kernel> {
    let link = dir.join(name);
    if let Ok(version) = fs::read_link(&link) {
        let version = version.display().to_string();
        return Ok(Kernel { root: dir.join(&version), version });
    }
    let mut refused = Error::Unsupported(format!("no kernel package in {packages:?} will do"));
    for package in packages {
        match version_of(package) {
            Ok(version) if Some(version.as_str()) == not => {}
            Ok(version) => {
                let kernel = download(dir, version)?;
                symlink(&kernel.version, &link).context(|| writing(&link))?;
                return Ok(kernel);
            }
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// The kernel version that the meta package `package` stands for today.
fn version_of(package: &str) -> Result<String> {
    install::dependencies(package)?
        .iter()
        .find_map(|name| name.strip_prefix("linux-image-").map(str::to_owned))
        .ok_or_else(|| Error::Unsupported(format!("{package} stands for no kernel")))
}

fn download(dir: &Path, version: String) -> Result<Kernel> {
    let root = dir.join(&version);
    if root.exists() {
        return Ok(Kernel { version, root });
    }
    eprintln!(
        "lab: fetching Linux {version} for the lab host and its guests (unpacked, not installed)"
    );
    let half = dir.join(format!("{version}.half"));
    if half.exists() {
        fs::remove_dir_all(&half).context(|| writing(&half))?;
    }
    install::unpack(&format!("linux-image-{version}"), &half)?;
    let lib = half.join("lib");
    if !lib.exists() {
        // Newer packages have no `lib`: the systems they are for have it as this link.
        symlink("usr/lib", &lib).context(|| writing(&lib))?;
    }
    let depmod = program::find("depmod").unwrap_or_else(|| "depmod".into());
    program::run(Command::new(depmod).arg("-b").arg(&half).arg(&version))?;
    let kernel = Kernel { root: half.clone(), version: version.clone() };
    let vmlinux = kernel.vmlinux();
    cache::write(&vmlinux, &uncompressed(&kernel.bzimage())?)?;
    fs::rename(&half, &root).context(|| writing(&root))?;
    Ok(Kernel { version, root })
}

impl Kernel {
    /// The kernel as distributions ship it.
    #[must_use]
    pub fn bzimage(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The same kernel as an uncompressed ELF file with a PVH entry.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinux-{}", self.version))
    }

    /// The uncompressed modules `names` and all that they need, each after what it needs.
    ///
    /// Names that this kernel has built in are left out.
    ///
    /// # Errors
    /// If a module is unknown or cannot be unpacked.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let dir = self.root.join("lib/modules").join(&self.version);
        let index = dir.join("modules.dep");
        let index = fs::read_to_string(&index).context(|| reading(&index))?;
        let builtin = fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        let mut paths: Vec<&str> = Vec::new();
        for name in names {
            if builtin.lines().any(|path| module_name(path) == *name) {
                continue;
            }
            for path in with_dependencies(&index, name)? {
                if !paths.contains(&path) {
                    paths.push(path);
                }
            }
        }
        paths
            .into_iter()
            .map(|path| Ok((format!("{}.ko", module_name(path)), decompressed(&dir.join(path))?)))
            .collect()
    }
}

/// The line of `modules.dep` for `name`, dependencies first. The last one named is needed first.
fn with_dependencies<'a>(index: &'a str, name: &str) -> Result<Vec<&'a str>> {
    let line = index
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| module_name(path) == name)
        .ok_or_else(|| Error::Unsupported(format!("this kernel has no module {name}")))?;
    let mut paths = line.1.split_whitespace().rev().collect::<Vec<_>>();
    paths.push(line.0);
    Ok(paths)
}

/// `kernel/fs/9p/9p.ko.xz` gives `9p`; dashes count as underscores.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).context(|| reading(path)),
    };
    let output = Command::new(tool)
        .arg("-dcq")
        .arg(path)
        .output()
        .context(|| format!("cannot run {tool}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Error::Program {
        program: format!("{tool} -dcq {}", path.display()),
        status: output.status,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// The ELF file inside a bzImage.
///
/// Source: Documentation/arch/x86/boot.rst of Linux, `payload_offset` and `payload_length`; the
/// payload ends in four bytes that give its uncompressed size.
fn uncompressed(bzimage: &Path) -> Result<Vec<u8>> {
    let image = fs::read(bzimage).context(|| reading(bzimage))?;
    let payload = payload(&image).ok_or_else(|| {
        Error::Unsupported(format!("{} is no bzImage with a payload", bzimage.display()))
    })?;
    let (name, tool) = match payload {
        [0xfd, b'7', b'z', ..] => ("kernel.xz", "xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("kernel.zst", "zstd"),
        [0x1f, 0x8b, ..] => ("kernel.gz", "gzip"),
        _ => {
            return Err(Error::Unsupported(format!(
                "{} is compressed in a way that is not known here",
                bzimage.display()
            )));
        }
    };
    let scratch = tempfile::tempdir().context(|| "cannot create a temporary directory".into())?;
    let packed = scratch.path().join(name);
    fs::write(&packed, payload).context(|| writing(&packed))?;
    let output = Command::new(tool)
        .arg("-dcq")
        .arg(&packed)
        .stderr(Stdio::null())
        .output()
        .context(|| format!("cannot run {tool}"))?;
    if output.status.success() && output.stdout.starts_with(b"\x7fELF") {
        return Ok(output.stdout);
    }
    Err(Error::Unsupported(format!(
        "{} holds no ELF file that {tool} can unpack",
        bzimage.display()
    )))
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?).max(4 * usize::from(image[0x1f1] == 0));
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let end = start.checked_add(word(0x24c)?.checked_sub(4)?)?;
    image.get(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
                         kernel/fs/netfs/netfs.ko.xz:\n";

    #[test]
    fn a_module_comes_after_what_it_needs() {
        assert_eq!(
            with_dependencies(INDEX, "9p").unwrap(),
            ["kernel/fs/netfs/netfs.ko.xz", "kernel/net/9p/9pnet.ko.xz", "kernel/fs/9p/9p.ko.xz"]
        );
        assert!(with_dependencies(INDEX, "nothing").is_err());
    }

    #[test]
    fn a_payload_outside_the_image_is_refused() {
        let mut image = vec![0; 8192];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x248] = 16;
        image[0x24c] = 12;
        assert_eq!(payload(&image).map(<[u8]>::len), Some(8));
        image[0x24f] = 0x10;
        assert_eq!(payload(&image), None);
        assert_eq!(payload(&image[..100]), None);
    }
}
