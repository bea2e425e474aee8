//! Reading settings from a TOML file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;

/// More than any sensible file holds.
const SIZE_MAX: u64 = 1 << 20;

/// Why a file gives no settings.
#[derive(Debug, Error)]
pub(super) enum FileError {
    #[error("cannot read the configuration {path}", path = path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the configuration {path} is longer than {SIZE_MAX} bytes: is it the right file?", path = path.display())]
    TooLong { path: PathBuf },
    #[error("{path}:{line}:{column}: {what}", path = path.display())]
    Wrong { path: PathBuf, line: usize, column: usize, what: String },
}

pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let unreadable = |source| FileError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(SIZE_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > SIZE_MAX {
        return Err(FileError::TooLong { path: path.to_owned() });
    }
    toml::from_str(&text).map_err(|error| {
        let (line, column) = position(&text, error.span().map_or(0, |span| span.start));
        let what = error.message().to_owned();
        FileError::Wrong { path: path.to_owned(), line, column, what }
    })
}

/// Line and column of a byte offset, both counted from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before: String = text.bytes().take(offset).map(char::from).collect();
    let line = before.matches('\n').count() + 1;
    (line, before.len() - before.rfind('\n').map_or(0, |newline| newline + 1) + 1)
}

#[cfg(test)]
mod tests {
    use super::super::run::RunArgs;
    use super::*;
    use proptest::prelude::*;

    fn complaint(text: &[u8]) -> String {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("vm.toml");
        std::fs::write(&path, text).unwrap();
        let error = read::<RunArgs>(&path).unwrap_err();
        crate::cause::chain(&error).replace(temporary.path().to_str().unwrap(), "")
    }

    #[test]
    fn a_mistake_is_shown_with_its_place() {
        for (text, says) in [
            ("cpus = 1\nmemry = '1G'\n", "/vm.toml:2:1: unknown field `memry`, expected one of"),
            ("cpus = 'two'", "/vm.toml:1:8: invalid type: string \"two\""),
            ("\n memory = '1Q'", "/vm.toml:2:11: \"1Q\" is not a size"),
            ("memory = 512", "/vm.toml:1:10: invalid type: integer `512`"),
            ("cpus = -1", "/vm.toml:1:8: invalid value: integer `-1`"),
            ("serial = ", "/vm.toml:1:"),
            ("[machine]\ncpus = 1", "/vm.toml:1:"),
            ("config = 'other.toml'", "unknown field `config`"),
        ] {
            let complaint = complaint(text.as_bytes());
            assert!(complaint.contains(says) && !complaint.contains('\n'), "{complaint}");
        }
    }

    #[test]
    fn what_is_no_text_or_endless_is_refused() {
        assert!(complaint(b"\xff\xfe").contains("valid UTF-8"));
        let endless = read::<RunArgs>(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(endless, FileError::TooLong { .. }), "{endless}");
        let missing = read::<RunArgs>(Path::new("/nowhere/vm.toml")).unwrap_err();
        assert!(matches!(missing, FileError::Unreadable { .. }), "{missing}");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(
            text in r#"([a-z]{1,8} ?=? ?('[^'\n]{0,5}'|-?[0-9]{1,20}|\[|\{|true|"[^"]{0,3}"?)\n?){0,4}"#,
            junk: String,
        ) {
            for text in [text, junk] {
                if let Err(error) = toml::from_str::<RunArgs>(&text) {
                    position(&text, error.span().map_or(0, |span| span.start));
                }
            }
        }
    }
}
