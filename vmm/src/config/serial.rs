//! Where the guest's first serial line is connected.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where the guest's first serial line is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SerialMode {
    /// The terminal, or whatever standard input and output are.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// Output is appended to this file.
    File(PathBuf),
    /// A Unix socket that is made at this path, for one client at a time.
    Socket(PathBuf),
}

/// Why a text does not say where the serial line goes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SerialError {
    /// None of the known words.
    #[error("{0:?} is not a place for the serial line: write stdio, null, file=F or socket=F")]
    Unknown(String),
    /// The file name is missing or holds a zero byte.
    #[error("{0:?} names no file: write file=F or socket=F")]
    NoFile(String),
}

impl FromStr for SerialMode {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        let path = |path: &str| {
            let usable = !path.is_empty() && !path.contains('\0');
            usable.then(|| path.into()).ok_or_else(|| SerialError::NoFile(text.to_owned()))
        };
        match text.split_once('=') {
            None if text == "stdio" => Ok(SerialMode::Stdio),
            None if text == "null" => Ok(SerialMode::Null),
            Some(("file", file)) => path(file).map(SerialMode::File),
            Some(("socket", file)) => path(file).map(SerialMode::Socket),
            _ => Err(SerialError::Unknown(text.to_owned())),
        }
    }
}

impl fmt::Display for SerialMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialMode::Stdio => f.write_str("stdio"),
            SerialMode::Null => f.write_str("null"),
            SerialMode::File(path) => write!(f, "file={}", path.display()),
            SerialMode::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

impl TryFrom<String> for SerialMode {
    type Error = SerialError;

    fn try_from(text: String) -> Result<Self, SerialError> {
        text.parse()
    }
}

impl From<SerialMode> for String {
    fn from(mode: SerialMode) -> String {
        mode.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_four_places_are_understood_and_nothing_else_is() {
        assert_eq!("stdio".parse(), Ok(SerialMode::Stdio));
        assert_eq!("null".parse(), Ok(SerialMode::Null));
        assert_eq!("file=a=b".parse(), Ok(SerialMode::File("a=b".into())));
        assert_eq!("socket=/s".parse(), Ok(SerialMode::Socket("/s".into())));
        for text in ["", "Stdio", "file", "stdio=", "pty", "tcp=1"] {
            assert!(matches!(text.parse::<SerialMode>(), Err(SerialError::Unknown(_))), "{text}");
        }
        for text in ["file=", "socket=", "file=a\0b"] {
            assert!(matches!(text.parse::<SerialMode>(), Err(SerialError::NoFile(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_survives_being_written_and_read(
            text in "(stdio|null|file|socket)=?[ -~]{0,12}"
        ) {
            if let Ok(mode) = text.parse::<SerialMode>() {
                prop_assert_eq!(mode.to_string().parse(), Ok(mode));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<SerialMode>();
        }
    }
}
