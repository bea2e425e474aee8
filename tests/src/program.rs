//! Programs of this machine that the lab calls.
use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{Context, Error, Result};

/// Directories of system programs that an ordinary user's `PATH` may lack.
const SYSTEM_PATHS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The path of the program `name`, looked for in `PATH` and where system programs live.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_PATHS.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// Runs `command` with no input and gives what it wrote on stdout.
///
/// # Errors
/// If it cannot be started, or ends with a status other than 0: then with the end of its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context(|| format!("cannot run {}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Program {
        program: describe(command),
        status: output.status,
        stderr: last_lines(&String::from_utf8_lossy(&output.stderr), 20),
    })
}

/// Runs `command` with `input` on its stdin.
///
/// # Errors
/// If it cannot be started or ends with a status other than 0.
pub fn feed(command: &mut Command, input: &[u8]) -> Result<()> {
    let what = describe(command);
    let mut child =
        command.stdin(Stdio::piped()).spawn().context(|| format!("cannot run {what}"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let written = stdin.write_all(input);
    drop(stdin);
    let status = child.wait().context(|| format!("cannot wait for {what}"))?;
    if !status.success() {
        return Err(Error::Program { program: what, status, stderr: String::new() });
    }
    written.context(|| format!("cannot write to {what}"))
}

/// The program and its arguments, as one would type them.
#[must_use]
pub fn describe(command: &Command) -> String {
    let mut text = command.get_program().display().to_string();
    for argument in command.get_args() {
        text.push(' ');
        let argument = argument.to_string_lossy();
        // A script given as an argument would bury what the message says.
        text.push_str(argument.split_once('\n').map_or(&argument, |(_line, _rest)| "<script>"));
    }
    text
}

/// The last `count` lines of `text`.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines = text.trim_end().lines().collect::<Vec<_>>();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
