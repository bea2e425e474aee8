//! Decisions about who may run, written down before they are acted on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::handover::{Giving, Taking, Token};

/// Where one side of a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We had the guest.
    Source(Giving),
    /// We shall have it.
    Destination(Taking),
}

/// Somewhere to write decisions down, such that they survive the process.
pub trait Record: Send {
    /// Returns only when `role` is on stable storage, in place of what was there for `token`.
    fn write(&mut self, token: Token, role: Role) -> io::Result<()>;
}

/// Writes nothing down: whoever cannot ask this process will not know.
#[derive(Debug, Default)]
pub struct NoRecord;

impl Record for NoRecord {
    fn write(&mut self, _: Token, _: Role) -> io::Result<()> {
        Ok(())
    }
}

/// One small file per migration: `TOKEN.handover`, holding such as `source asked`.
#[derive(Debug)]
pub struct FileRecord {
    directory: PathBuf,
}

impl FileRecord {
    /// Writes into `directory`, which exists.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// What is written in `directory` about `token`; none if nothing is, or nothing readable.
    pub fn read(directory: &Path, token: Token) -> io::Result<Option<Role>> {
        match fs::read_to_string(directory.join(file_name(token))) {
            Ok(text) => Ok(ROLES.iter().find(|(_, word)| *word == text.trim_end()).map(|r| r.0)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Record for FileRecord {
    fn write(&mut self, token: Token, role: Role) -> io::Result<()> {
        let (_, word) = ROLES.iter().find(|(known, _)| *known == role).expect("all are listed");
        let path = self.directory.join(file_name(token));
        let draft = path.with_extension("draft");
        let mut file = File::create(&draft)?;
        writeln!(file, "{word}")?;
        file.sync_all()?;
        fs::rename(&draft, &path)?;
        File::open(&self.directory)?.sync_all()
    }
}

const ROLES: [(Role, &str); 8] = [
    (Role::Source(Giving::Mine), "source mine"),
    (Role::Source(Giving::Asked), "source asked"),
    (Role::Source(Giving::Given), "source given"),
    (Role::Source(Giving::Back), "source back"),
    (Role::Destination(Taking::Empty), "destination empty"),
    (Role::Destination(Taking::Ready), "destination ready"),
    (Role::Destination(Taking::Running), "destination running"),
    (Role::Destination(Taking::Dead), "destination dead"),
];

fn file_name(token: Token) -> String {
    format!("{token}.handover")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let token = Token::random().unwrap();
        assert_eq!(FileRecord::read(directory.path(), token).unwrap(), None);
        let mut record = FileRecord::new(directory.path());
        for (role, _) in ROLES {
            record.write(token, role).unwrap();
            assert_eq!(FileRecord::read(directory.path(), token).unwrap(), Some(role));
        }
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing but the record stays: {names:?}");
    }

    #[test]
    fn a_torn_record_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let token = Token::random().unwrap();
        fs::write(directory.path().join(file_name(token)), "source as").unwrap();
        assert_eq!(FileRecord::read(directory.path(), token).unwrap(), None);
    }
}
