//! The directory where running VMs are found by name.
//!
//! A VM called NAME owns two files in it: `NAME.lock`, which it keeps locked for as long as it
//! lives, and `NAME.sock`, its control socket. The lock tells a living VM from the files of a
//! dead one, since the kernel drops it however the process ends.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;

use crate::config::VmName;

/// The directory that may be named by the environment.
const ENVIRONMENT: &str = "UVMM_RUNTIME_DIR";
/// How many unnamed VMs may run at once.
const UNNAMED_MAX: u32 = 10_000;

/// Where running VMs are found.
#[derive(Debug, Clone)]
pub struct RuntimeDir {
    path: PathBuf,
}

/// A name that belongs to this process until this is dropped.
#[derive(Debug)]
pub struct Claim {
    name: VmName,
    socket: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

/// Why the runtime directory cannot be used, or a name in it.
#[derive(Debug, Error)]
pub enum RuntimeDirError {
    /// It cannot be made, read or written.
    #[error("cannot use the runtime directory {path}: set {ENVIRONMENT} to another", path = path.display())]
    Unusable {
        /// The directory or a file in it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could put their sockets there.
    #[error("the runtime directory {path} is not private: {why}, or set {ENVIRONMENT} to another", path = path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// A living VM has the name.
    #[error("the name {0} is in use by a running VM: choose another with --name")]
    NameInUse(VmName),
    /// Every `vmN` is taken.
    #[error("{UNNAMED_MAX} unnamed VMs run already: choose a name with --name")]
    NoFreeName,
}

impl RuntimeDir {
    /// Finds the directory and makes it if there is none: `$UVMM_RUNTIME_DIR`, else
    /// `$XDG_RUNTIME_DIR/uvmm`, else `/run/uvmm` for root and `/tmp/uvmm-UID` for others.
    ///
    /// # Errors
    /// It cannot be made, or it is not a directory of this user with mode 0700.
    pub fn open() -> Result<Self, RuntimeDirError> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let user = geteuid();
        let path = set(ENVIRONMENT)
            .or_else(|| set("XDG_RUNTIME_DIR").map(|dir| dir.join("uvmm")))
            .unwrap_or_else(|| {
                let own = format!("/tmp/uvmm-{}", user.as_raw());
                PathBuf::from(if user.is_root() { "/run/uvmm" } else { &own })
            });
        Self::at(path)
    }

    /// Uses this directory, made if it is missing.
    ///
    /// # Errors
    /// As for [`RuntimeDir::open`].
    pub fn at(path: PathBuf) -> Result<Self, RuntimeDirError> {
        let dir = RuntimeDir { path };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir.path);
        made.map_err(|source| dir.unusable(&dir.path, source))?;
        // Not followed if it is a link: in /tmp, anyone could have put one there.
        let found = fs::symlink_metadata(&dir.path).map_err(|e| dir.unusable(&dir.path, e))?;
        let owner = geteuid().as_raw();
        let why = if !found.is_dir() {
            "it is not a directory: remove it".to_owned()
        } else if found.uid() != owner {
            format!("it belongs to user {}, not {owner}: remove it", found.uid())
        } else if found.mode() & 0o077 != 0 {
            format!("its mode is {:o}: chmod it to 700", found.mode() & 0o7777)
        } else {
            return Ok(dir);
        };
        Err(RuntimeDirError::NotPrivate { path: dir.path, why })
    }

    /// Takes `name` for this process, or the lowest free `vmN`.
    ///
    /// Files that a dead VM left under that name are removed.
    ///
    /// # Errors
    /// [`RuntimeDirError::NameInUse`], or the directory cannot be written.
    pub fn claim(&self, name: Option<&VmName>) -> Result<Claim, RuntimeDirError> {
        if let Some(name) = name {
            return self.try_claim(name)?.ok_or_else(|| RuntimeDirError::NameInUse(name.clone()));
        }
        for number in 0..UNNAMED_MAX {
            if let Some(claim) = self.try_claim(&VmName::numbered(number))? {
                return Ok(claim);
            }
        }
        Err(RuntimeDirError::NoFreeName)
    }

    /// The names of the VMs that live, sorted.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn living(&self) -> Result<Vec<VmName>, RuntimeDirError> {
        let unusable = |e| self.unusable(&self.path, e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unusable)? {
            let file = entry.map_err(unusable)?.file_name();
            let stem = file.to_str().and_then(|name| name.strip_suffix(".lock"));
            if let Some(name) = stem.and_then(|stem| stem.parse().ok())
                && self.is_living(&name)
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Whether a process holds this name.
    #[must_use]
    pub fn is_living(&self, name: &VmName) -> bool {
        // A shared lock, and only for a moment: two of these never see each other as a VM.
        let Ok(lock) = File::open(self.file(name, "lock")) else { return false };
        flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }

    /// The control socket of that VM.
    #[must_use]
    pub fn socket(&self, name: &VmName) -> PathBuf {
        self.file(name, "sock")
    }

    fn file(&self, name: &VmName, kind: &str) -> PathBuf {
        self.path.join(format!("{name}.{kind}"))
    }

    fn unusable(&self, path: &Path, source: io::Error) -> RuntimeDirError {
        RuntimeDirError::Unusable { path: path.to_owned(), source }
    }

    fn try_claim(&self, name: &VmName) -> Result<Option<Claim>, RuntimeDirError> {
        let lock_path = self.file(name, "lock");
        let unusable = |e| self.unusable(&lock_path, e);
        loop {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
            let lock = options.open(&lock_path).map_err(unusable)?;
            match lock_exclusively(&lock) {
                Err(Errno::WOULDBLOCK) => return Ok(None),
                locked => locked.map_err(|e| unusable(e.into()))?,
            }
            // A VM that was ending may have removed the file between our opening and locking
            // it. Then the name is no longer held by what we locked.
            let held = lock.metadata().map_err(unusable)?;
            let there = fs::symlink_metadata(&lock_path);
            if !there.is_ok_and(|there| (there.dev(), there.ino()) == (held.dev(), held.ino())) {
                continue;
            }
            let socket = self.socket(name);
            match fs::remove_file(&socket) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(self.unusable(&socket, e));
                }
                _ => {}
            }
            return Ok(Some(Claim { name: name.clone(), socket, lock_path, _lock: lock }));
        }
    }
}

/// Locks at once, or after the moment for which [`RuntimeDir::is_living`] may hold it.
fn lock_exclusively(lock: &File) -> Result<(), Errno> {
    let mut last = Ok(());
    for _ in 0..5 {
        last = flock(lock, FlockOperation::NonBlockingLockExclusive);
        if last != Err(Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    last
}

impl Claim {
    /// The name that was taken.
    #[must_use]
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Where the control socket of this VM belongs.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// Nothing stays behind: the socket first, then the lock, while it is still held.
impl Drop for Claim {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
        let _ = fs::remove_file(&self.lock_path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn runtime_dir() -> (tempfile::TempDir, RuntimeDir) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::at(temporary.path().join("uvmm")).unwrap();
        (temporary, dir)
    }

    #[test]
    fn a_name_in_use_is_refused_and_is_free_again_afterwards() {
        let (_temporary, dir) = runtime_dir();
        let name: VmName = "a".parse().unwrap();
        let claim = dir.claim(Some(&name)).unwrap();
        assert_eq!(dir.living().unwrap(), std::slice::from_ref(&name));
        let error = dir.claim(Some(&name)).unwrap_err();
        assert!(matches!(error, RuntimeDirError::NameInUse(_)), "{error}");
        drop(claim);
        assert!(dir.living().unwrap().is_empty());
        assert_eq!(fs::read_dir(&dir.path).unwrap().count(), 0, "nothing stays behind");
        dir.claim(Some(&name)).unwrap();
    }

    #[test]
    fn unnamed_vms_take_the_lowest_free_number() {
        let (_temporary, dir) = runtime_dir();
        let first = dir.claim(None).unwrap();
        let second = dir.claim(None).unwrap();
        assert_eq!((first.name().as_str(), second.name().as_str()), ("vm0", "vm1"));
        drop(first);
        assert_eq!(dir.claim(None).unwrap().name().as_str(), "vm0");
    }

    #[test]
    fn the_files_of_a_dead_vm_are_taken_over() {
        let (_temporary, dir) = runtime_dir();
        let name: VmName = "dead".parse().unwrap();
        fs::write(dir.file(&name, "lock"), "").unwrap();
        fs::write(dir.socket(&name), "").unwrap();
        assert!(dir.living().unwrap().is_empty());
        let claim = dir.claim(Some(&name)).unwrap();
        assert!(!claim.socket().exists());
    }

    #[test]
    fn many_at_once_never_share_a_name() {
        let (_temporary, dir) = runtime_dir();
        let barrier = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            let claim = || {
                barrier.wait();
                for _ in 0..50 {
                    let claim = dir.claim(None).unwrap();
                    fs::write(claim.socket(), "").unwrap();
                    std::thread::yield_now();
                    assert!(claim.socket().exists(), "another took {} over", claim.name());
                }
            };
            for _ in 0..8 {
                scope.spawn(claim);
            }
        });
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let open = temporary.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let link = temporary.path().join("link");
        std::os::unix::fs::symlink(temporary.path(), &link).unwrap();
        for path in [open, link] {
            let error = RuntimeDir::at(path).unwrap_err();
            assert!(matches!(error, RuntimeDirError::NotPrivate { .. }), "{error}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_says_so() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RuntimeDir::at(file.join("uvmm")).unwrap_err();
        assert!(matches!(error, RuntimeDirError::Unusable { .. }), "{error}");
    }
}
