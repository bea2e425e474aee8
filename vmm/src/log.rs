//! The log: lines on standard error or in a file, for whoever runs the VM.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use thiserror::Error;
use tracing::level_filters::LevelFilter;

/// Why there is no log.
#[derive(Debug, Error)]
#[error("cannot write the log {path}", path = path.display())]
pub struct LogError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Begins the log, once in a process.
///
/// Without a file, warnings go to standard error; a file also gets what is worth knowing
/// afterwards. Each step of `verbosity` adds a level to that.
///
/// # Errors
/// The file cannot be opened for appending.
pub fn begin(path: Option<&Path>, verbosity: u8) -> Result<(), LogError> {
    const LEVELS: [LevelFilter; 4] =
        [LevelFilter::WARN, LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::TRACE];
    let step = usize::from(verbosity) + usize::from(path.is_some());
    let lines = tracing_subscriber::fmt()
        .with_max_level(LEVELS[step.min(LEVELS.len() - 1)])
        .with_target(false)
        .with_ansi(false)
        .log_internal_errors(false);
    let Some(path) = path else {
        // That another log was begun before is no reason to stop.
        let _ = lines.with_writer(io::stderr).try_init();
        return Ok(());
    };
    let mut options = OpenOptions::new();
    let opened = options.append(true).create(true).mode(0o600).open(path);
    let file = opened.map_err(|source| LogError { path: path.to_owned(), source })?;
    let file = LogFile { path: path.to_owned(), file, failing: false };
    let _ = lines.with_writer(Mutex::new(file)).try_init();
    Ok(())
}

/// A file whose trouble is told once, and is nobody else's.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: File,
    failing: bool,
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.file.write_all(line) {
            Err(error) if !self.failing => {
                self.failing = true;
                let path = self.path.display();
                // There is nobody left to tell if this fails too.
                let _ = writeln!(
                    io::stderr(),
                    "uvmm: log lines are lost: cannot write {path}: {error}"
                );
            }
            outcome => self.failing = outcome.is_err(),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_loses_log_lines_and_nothing_else() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let mut log = LogFile { path, file, failing: false };
        for _ in 0..2 {
            assert_eq!(log.write(b"line\n").unwrap(), 5);
            assert!(log.failing);
        }
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_an_error() {
        let temporary = tempfile::tempdir().unwrap();
        let error = begin(Some(&temporary.path().join("none/log")), 0).unwrap_err();
        assert!(error.to_string().starts_with("cannot write the log"), "{error}");
    }
}
