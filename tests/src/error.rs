//! What can go wrong in the lab, said so that the reader knows what to do.
use std::io;
use std::path::Path;
use std::process::ExitStatus;

/// An error of the lab or of the test harness.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, socket or process failed.
    #[error("{what}")]
    Io {
        /// What was tried, and on what.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program that the lab runs ended with an error.
    #[error("{program} ended with {status}{}{stderr}", if stderr.is_empty() { "" } else { ": " })]
    Program {
        /// The program and its arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// Something that a deadline was set for did not happen.
    #[error("{0}")]
    Timeout(String),
    /// The lab host ended or said something it should not have said.
    #[error("{0}")]
    Host(String),
    /// A guest, or the uvmm that runs it, did something else than expected.
    #[error("{0}")]
    Guest(String),
    /// This machine cannot do what was asked.
    #[error("{0}")]
    Unsupported(String),
}

/// The result of anything the lab does.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds to an I/O error what was tried.
pub trait Context<T> {
    /// Turns an I/O error into [`Error::Io`]; `what` is called on errors only.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}

/// The message for a path that cannot be read.
#[must_use]
pub fn reading(path: &Path) -> String {
    format!("cannot read {}", path.display())
}

/// The message for a path that cannot be written.
#[must_use]
pub fn writing(path: &Path) -> String {
    format!("cannot write {}", path.display())
}
