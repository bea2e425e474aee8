//! A file that is there whole, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What is written under another name until it is whole. Dropped before that, it is removed.
#[derive(Debug)]
pub(super) struct Draft {
    file: File,
    /// Its name until it is kept; none then.
    name: Option<PathBuf>,
    whole: PathBuf,
}

impl Draft {
    /// Begins what shall be at `path`, in place of any file that is there; gives what to write to.
    ///
    /// Only its owner can read it: all of a guest is in it.
    pub(super) fn begin(path: &Path) -> io::Result<(Self, File)> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let own = path.file_name().ok_or_else(|| invalid("the path names no file"))?;
        match fs::symlink_metadata(path) {
            Ok(there) if !there.is_file() => {
                return Err(invalid("there is something of that name that is no file"));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut name = own.to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let name = path.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&name)?;
        let draft = Self { file, name: Some(name), whole: path.to_owned() };
        let sheet = draft.file.try_clone()?;
        Ok((draft, sheet))
    }

    /// Returns once it is on stable storage under its name.
    pub(super) fn keep(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(name) = &self.name {
            fs::rename(name, &self.whole)?;
        }
        self.name = None;
        let dir = self.whole.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name
            && let Err(error) = fs::remove_file(name)
        {
            tracing::warn!(%error, name = %name.display(), "half a snapshot stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_whole_in_place_of_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.snap");
        fs::write(&path, "old").unwrap();
        let (draft, mut sheet) = Draft::begin(&path).unwrap();
        sheet.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        draft.keep().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(dir.path()), ["web.snap"]);
    }

    #[test]
    fn what_is_not_kept_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (draft, sheet) = Draft::begin(&dir.path().join("it")).unwrap();
        drop((draft, sheet));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for path in [Path::new("/dev/null"), dir.path(), Path::new("/"), Path::new("/no/dir/it")] {
            Draft::begin(path).unwrap_err();
        }
        assert!(names(dir.path()).is_empty());
    }
}
