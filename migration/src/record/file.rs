//! Decisions in files: one small text file per migration and side of it, `TOKEN.source` and
//! `TOKEN.destination`, since both sides may be on one host.
//!
//! ```text
//! name web
//! peer tcp:h:4444
//! source asked
//! ```
//!
//! Lines are only ever appended. The last whole one that says where a side stands counts: one that
//! a crash tore does not. A process keeps the file locked while it lives, so that others can tell
//! what a living process decides from what a dead one left.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, OFlags, flock};

use super::{Record, Role};
use crate::handover::{Giving, Taking, Token};

/// The most that is read of one file, in bytes. Longer ones are not ours.
const SIZE_LIMIT: u64 = 64 << 10;

/// Which half of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The half that had the guest.
    Source,
    /// The half that shall have it.
    Destination,
}

impl Side {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    fn of(role: Role) -> Self {
        match role {
            Role::Source(_) => Self::Source,
            Role::Destination(_) => Self::Destination,
        }
    }
}

/// What a file says besides the decision, for people and for whoever asks later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// The guest, as this host calls it.
    pub name: String,
    /// The other side.
    pub peer: String,
}

/// What is written of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Which.
    pub token: Token,
    /// Whose guest it is about, and who has the other half.
    pub about: About,
    /// The decision; none if nothing readable was written.
    pub role: Option<Role>,
    /// When that was.
    pub since: SystemTime,
    /// Whether the process that writes there lives.
    pub living: bool,
}

/// Writes into a directory. Clones write into the same file.
#[derive(Clone)]
pub struct FileRecord {
    directory: PathBuf,
    about: About,
    open: Arc<Mutex<Option<(Token, Side, File)>>>,
}

impl FileRecord {
    /// Writes into `directory`, which exists, about one migration.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, about: About) -> Self {
        Self { directory: directory.into(), about, open: Arc::default() }
    }

    /// All that is written in `directory`, oldest first. What cannot be read is left out.
    pub fn list(directory: &Path) -> io::Result<Vec<Written>> {
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut list = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('.'));
            let Some((Ok(token), suffix)) = parts.map(|(stem, end)| (stem.parse(), end)) else {
                continue;
            };
            let sides = [Side::Source, Side::Destination];
            let Some(side) = sides.into_iter().find(|side| side.suffix() == suffix) else {
                continue;
            };
            match look(directory, token, side) {
                Ok(written) => list.push(written),
                Err(error) => tracing::warn!(%error, %token, "cannot read a record"),
            }
        }
        list.sort_by_key(|written| written.since);
        Ok(list)
    }

    /// Takes over what a process that ended wrote about `token`, or has not yet let go of. None if
    /// there is nothing, or if that process lives.
    pub fn take_over(
        directory: &Path,
        token: Token,
        side: Side,
    ) -> io::Result<Option<(Written, Self)>> {
        let file = match options().open(path(directory, token, side)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        if !lock(&file)? {
            return Ok(None);
        }
        let written = read(&file, token, false)?;
        let record = Self::new(directory, written.about.clone());
        *record.open.lock().unwrap_or_else(PoisonError::into_inner) = Some((token, side, file));
        Ok(Some((written, record)))
    }

    fn begin(&self, token: Token, side: Side) -> io::Result<File> {
        let mut file = options().create(true).open(path(&self.directory, token, side))?;
        if !lock(&file)? {
            return Err(io::Error::new(ErrorKind::WouldBlock, "another process writes there"));
        }
        let About { name, peer } = &self.about;
        file.write_all(format!("name {}\npeer {}", one_line(name), one_line(peer)).as_bytes())?;
        File::open(&self.directory)?.sync_all()?;
        Ok(file)
    }
}

impl fmt::Debug for FileRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRecord").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Record for FileRecord {
    fn write(&mut self, token: Token, role: Role) -> io::Result<()> {
        let (_, word) = ROLES.iter().find(|(known, _)| *known == role).expect("all are listed");
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let side = Side::of(role);
        if open.as_ref().is_none_or(|(of, half, _)| (*of, *half) != (token, side)) {
            *open = Some((token, side, self.begin(token, side)?));
        }
        let (_, _, file) = open.as_mut().expect("just opened");
        // The line break before it ends what an earlier write may have torn.
        file.write_all(format!("\n{word}\n").as_bytes())?;
        file.sync_all()
    }

    fn forget(&mut self, token: Token) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, side, _)) = open.as_ref().filter(|(of, _, _)| *of == token) else {
            return Ok(());
        };
        match fs::remove_file(path(&self.directory, token, *side)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        *open = None;
        File::open(&self.directory)?.sync_all()
    }

    fn earlier(&self, token: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
        let Some((written, record)) = Self::take_over(&self.directory, token, Side::Destination)?
        else {
            return Ok(None);
        };
        Ok(written.role.map(|role| (role, Box::new(record) as _)))
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).append(true).mode(0o600).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

fn path(directory: &Path, token: Token, side: Side) -> PathBuf {
    directory.join(format!("{token}.{}", side.suffix()))
}

/// Locks `file` for as long as it is open; false if a living process has it.
fn lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        locked => Ok(locked.map(|()| true)?),
    }
}

/// Reads without keeping the lock.
fn look(directory: &Path, token: Token, side: Side) -> io::Result<Written> {
    let file = options().open(path(directory, token, side))?;
    // Shared, so that two who look at once do not take each other for the owner.
    let free = flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
    read(&file, token, !free)
}

fn read(file: &File, token: Token, living: bool) -> io::Result<Written> {
    let since = file.metadata()?.modified()?;
    let mut text = Vec::new();
    file.take(SIZE_LIMIT).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let mut written = Written { token, about: About::default(), role: None, since, living };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        if let Some((role, _)) = ROLES.iter().find(|(_, word)| *word == line) {
            written.role = Some(*role);
        } else if let Some(name) = line.strip_prefix("name ") {
            written.about.name = name.to_owned();
        } else if let Some(peer) = line.strip_prefix("peer ") {
            written.about.peer = peer.to_owned();
        }
    }
    Ok(written)
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

const ROLES: [(Role, &str); 9] = [
    (Role::Source(Giving::Mine), "source mine"),
    (Role::Source(Giving::Awaited), "source awaited"),
    (Role::Source(Giving::Asked), "source asked"),
    (Role::Source(Giving::Given), "source given"),
    (Role::Source(Giving::Back), "source back"),
    (Role::Destination(Taking::Empty), "destination empty"),
    (Role::Destination(Taking::Ready), "destination ready"),
    (Role::Destination(Taking::Running), "destination running"),
    (Role::Destination(Taking::Dead), "destination dead"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token::random().unwrap()
    }

    fn about() -> About {
        About { name: "web".into(), peer: "tcp:h:1".into() }
    }

    #[test]
    fn what_a_process_wrote_is_read_after_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let token = token();
        let mut record = FileRecord::new(directory.path(), about());
        for (role, _) in ROLES.into_iter().filter(|(role, _)| Side::of(*role) == Side::Destination)
        {
            record.write(token, role).unwrap();
            let list = FileRecord::list(directory.path()).unwrap();
            assert_eq!((list.len(), list[0].role, list[0].living), (1, Some(role), true));
            assert!(record.earlier(token).unwrap().is_none(), "its process lives");
        }
        drop(record);
        let [written] = &FileRecord::list(directory.path()).unwrap()[..] else { panic!() };
        assert_eq!((&written.about, written.living), (&about(), false));
        let other = FileRecord::new(directory.path(), About::default());
        let (role, mut record) = other.earlier(token).unwrap().unwrap();
        assert_eq!(role, Role::Destination(Taking::Dead));
        record.write(token, Role::Destination(Taking::Dead)).unwrap();
        record.forget(token).unwrap();
        assert_eq!(FileRecord::list(directory.path()).unwrap(), []);
    }

    #[test]
    fn a_torn_line_does_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let token = token();
        let mut record = FileRecord::new(directory.path(), about());
        record.write(token, Role::Source(Giving::Asked)).unwrap();
        let whole = fs::read(path(directory.path(), token, Side::Source)).unwrap();
        record.write(token, Role::Source(Giving::Given)).unwrap();
        let all = fs::read(path(directory.path(), token, Side::Source)).unwrap();
        drop(record);
        for end in 0..=all.len() {
            fs::write(path(directory.path(), token, Side::Source), &all[..end]).unwrap();
            let role = FileRecord::list(directory.path()).unwrap()[0].role;
            let expected = match end {
                _ if end == all.len() => Some(Role::Source(Giving::Given)),
                _ if end >= whole.len() => Some(Role::Source(Giving::Asked)),
                _ => None,
            };
            assert_eq!(role, expected, "cut after {end} bytes");
            let (_, mut again) =
                FileRecord::take_over(directory.path(), token, Side::Source).unwrap().unwrap();
            again.write(token, Role::Source(Giving::Back)).unwrap();
            drop(again);
            let role = FileRecord::list(directory.path()).unwrap()[0].role;
            assert_eq!(role, Some(Role::Source(Giving::Back)), "written on after {end} bytes");
        }
    }

    #[test]
    fn other_files_and_long_names_do_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("x.source"), "source asked\n").unwrap();
        fs::write(directory.path().join(format!("{}.source", token())), [0xff; 100]).unwrap();
        let evil = About { name: "a\nsource given".into(), peer: "b\nsource given".into() };
        let mut record = FileRecord::new(directory.path(), evil);
        record.write(token(), Role::Source(Giving::Asked)).unwrap();
        let list = FileRecord::list(directory.path()).unwrap();
        let roles: Vec<_> = list.iter().filter_map(|written| written.role).collect();
        assert_eq!((list.len(), roles), (2, vec![Role::Source(Giving::Asked)]));
    }

    #[test]
    fn both_sides_of_a_migration_can_be_on_one_host() {
        let directory = tempfile::tempdir().unwrap();
        let token = token();
        let mut here = FileRecord::new(directory.path(), about());
        let mut there = FileRecord::new(directory.path(), About::default());
        there.write(token, Role::Destination(Taking::Ready)).unwrap();
        here.write(token, Role::Source(Giving::Asked)).unwrap();
        assert_eq!(FileRecord::list(directory.path()).unwrap().len(), 2);
        here.forget(token).unwrap();
        let [left] = &FileRecord::list(directory.path()).unwrap()[..] else { panic!() };
        assert_eq!(left.role, Some(Role::Destination(Taking::Ready)));
    }

    #[test]
    fn a_directory_that_is_not_there_holds_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(FileRecord::list(&directory.path().join("none")).unwrap(), []);
        let mut record = FileRecord::new(directory.path().join("none"), about());
        record.write(token(), Role::Source(Giving::Asked)).unwrap_err();
    }
}
