//! The terminal handing over every key as it is typed.

use std::os::fd::AsFd;
use std::sync::{Mutex, Once, PoisonError};

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// How the terminal was before: where a panic on any thread finds it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input is a terminal in raw mode until this is dropped, or until any thread panics.
#[derive(Debug)]
pub(super) struct RawMode(());

/// Whether standard input is a terminal that this process may read.
///
/// A process in the background would be stopped for touching it.
pub(super) fn is_usable(input: impl AsFd) -> bool {
    isatty(&input) && tcgetpgrp(&input).is_ok_and(|foreground| foreground == getpgrp())
}

impl RawMode {
    /// Switches the terminal that standard input is.
    ///
    /// Output is left as it is, so that log lines between the guest's still start on the left.
    pub(super) fn enter() -> Result<Self, Errno> {
        static RESTORE_ON_PANIC: Once = Once::new();
        RESTORE_ON_PANIC.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                report(panic);
            }));
        });
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let raw_mode = RawMode(());
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(raw_mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // If this fails there is no terminal any more.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
