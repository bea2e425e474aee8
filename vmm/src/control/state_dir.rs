//! The directory where decisions of migrations outlive the processes that took them.
//!
//! Each migration whose outcome somebody may still have to ask for has a file there, see
//! [`migration::record`]. Unlike the runtime directory it must survive a reboot: a guest that was
//! given away must not be booted again by whatever starts VMs here.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use migration::handover::{Giving, Token};
use migration::record::{About, FileRecord, Role, Written, may_boot};
use rustix::process::geteuid;
use thiserror::Error;

use crate::config::VmName;

/// The directory that may be named by the environment.
const ENVIRONMENT: &str = "UVMM_STATE_DIR";

/// Where decisions are kept.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

/// Why decisions cannot be kept or found, or stand in the way.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// This user has no home.
    #[error("there is no directory for decisions of migrations: set {ENVIRONMENT} to one")]
    Nowhere,
    /// It cannot be made, read or written.
    #[error("cannot use the state directory {path}: set {ENVIRONMENT} to another", path = path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A guest of that name may run elsewhere.
    #[error(
        "{name} was given away to {peer} in migration {token} and may run there: \
         see `uvmm resolve`, or choose another name"
    )]
    Away {
        /// The guest.
        name: VmName,
        /// Where it may run.
        peer: String,
        /// The migration.
        token: Token,
    },
}

impl StateDir {
    /// `$UVMM_STATE_DIR`, else `/var/lib/uvmm` for root, and `$XDG_STATE_HOME/uvmm` or
    /// `~/.local/state/uvmm` for others. It need not be there yet.
    ///
    /// # Errors
    /// [`StateDirError::Nowhere`].
    pub fn find() -> Result<Self, StateDirError> {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let at = |path| Ok(Self { path });
        if let Some(path) = set(ENVIRONMENT) {
            return at(path);
        }
        if geteuid().is_root() {
            return at("/var/lib/uvmm".into());
        }
        let home = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
        home.map(|home| Self { path: home.join("uvmm") }).ok_or(StateDirError::Nowhere)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the decisions of one migration go; the directory is made if it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn record(&self, name: &VmName, peer: String) -> Result<FileRecord, StateDirError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        made.map_err(|source| self.unusable(source))?;
        Ok(FileRecord::new(&self.path, About { name: name.to_string(), peer }))
    }

    /// Guests that processes which have ended gave away without learning what became of them.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn undecided(&self) -> Result<Vec<Written>, StateDirError> {
        let mut list = FileRecord::list(&self.path).map_err(|source| self.unusable(source))?;
        let asked = Some(Role::Source(Giving::Asked));
        list.retain(|written| !written.living && written.role == asked);
        Ok(list)
    }

    /// Makes sure that a guest called `name` may be booted here.
    ///
    /// # Errors
    /// [`StateDirError::Away`], or the directory cannot be read.
    pub fn allow_boot(&self, name: &VmName) -> Result<(), StateDirError> {
        let of_it = |written: &Written| written.about.name == name.as_str();
        let list = FileRecord::list(&self.path).map_err(|source| self.unusable(source))?;
        let away = list.into_iter().filter(of_it).find(|written| !may_boot(written.role));
        match away {
            None => Ok(()),
            Some(Written { about, token, .. }) => {
                Err(StateDirError::Away { name: name.clone(), peer: about.peer, token })
            }
        }
    }

    fn unusable(&self, source: io::Error) -> StateDirError {
        StateDirError::Unusable { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use migration::handover::Taking;
    use migration::record::Record;

    use super::*;

    #[test]
    fn only_a_guest_that_may_run_elsewhere_may_not_be_booted() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = StateDir { path: temporary.path().join("state") };
        let name: VmName = "web".parse().unwrap();
        dir.allow_boot(&name).unwrap();
        let token = Token::random().unwrap();
        for (role, boots) in [
            (Role::Destination(Taking::Running), true),
            (Role::Source(Giving::Back), true),
            (Role::Source(Giving::Given), false),
            (Role::Source(Giving::Asked), false),
        ] {
            let mut record = dir.record(&name, "tcp:h:1".into()).unwrap();
            record.write(token, role).unwrap();
            assert!(dir.undecided().unwrap().is_empty(), "its process lives");
            drop(record);
            assert_eq!(dir.allow_boot(&name).is_ok(), boots, "{role:?}");
            dir.allow_boot(&"other".parse().unwrap()).unwrap();
        }
        let error = dir.allow_boot(&name).unwrap_err().to_string();
        assert!(error.contains("tcp:h:1") && error.contains("uvmm resolve"), "{error}");
        assert_eq!(dir.undecided().unwrap().len(), 1);
    }
}
