//! Where the lab keeps what it downloads and builds: `lab/` in cargo's target directory.
use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Context, Error, Result, writing};

/// The directory, created if need be.
///
/// # Errors
/// If the running program does not lie in a target directory, or that cannot be written.
pub fn dir() -> Result<PathBuf> {
    let dir = target()?.join("lab");
    fs::create_dir_all(&dir).context(|| writing(&dir))?;
    Ok(dir)
}

/// Cargo's target directory, found from where the running program lies in it.
///
/// # Errors
/// If the running program does not lie in a target directory.
pub fn target() -> Result<PathBuf> {
    let exe = env::current_exe().context(|| "cannot tell where this program is".into())?;
    exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()).map(Path::to_path_buf).ok_or_else(
        || Error::Unsupported(format!("{} is in no cargo target directory", exe.display())),
    )
}

/// Holds off others that fill the cache, until dropped.
///
/// # Errors
/// If the lock file cannot be opened.
pub fn lock() -> Result<File> {
    let path = dir()?.join("lock");
    let file = File::create(&path).context(|| writing(&path))?;
    flock(&file, FlockOperation::LockExclusive)
        .context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Writes `path` whole or not at all.
///
/// # Errors
/// If the directory of `path` cannot be written.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    let mut file = tempfile::NamedTempFile::new_in(parent).context(|| writing(path))?;
    file.write_all(content).context(|| writing(path))?;
    file.persist(path).map_err(|failed| failed.error).context(|| writing(path))?;
    Ok(())
}
