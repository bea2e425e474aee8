//! The interrupt pins of functions and the lines of the machine that they share.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::irq::{LevelTrigger, Line};

/// Which of the host bridge's lines pin `pin` of root device `device` is wired to, out of `lines`.
///
/// What describes the machine to the guest must say the same.
#[must_use]
pub fn root_line(device: u8, pin: u8, lines: u8) -> u8 {
    (device % lines + pin % lines) % lines
}

/// The pin of a bridge that pin `pin`, 0 to 3, of `device` behind it is wired to
/// (PCI-to-PCI Bridge 1.2, table 9-1).
#[must_use]
pub fn swizzle(device: u8, pin: u8) -> u8 {
    (device % 4 + pin % 4) % 4
}

/// A line of the machine that is asserted as long as anybody asserts it.
pub struct SharedLine {
    line: Arc<dyn Line>,
    asserted: Mutex<usize>,
}

impl SharedLine {
    /// Shares `line`, which nobody asserts yet.
    #[must_use]
    pub fn new(line: Arc<dyn Line>) -> Arc<Self> {
        Arc::new(Self { line, asserted: Mutex::new(0) })
    }

    /// One more who may assert it, until dropped.
    #[must_use]
    pub fn source(self: &Arc<Self>) -> Arc<dyn Line> {
        Arc::new(Source { shared: Arc::clone(self), level: AtomicBool::new(false) })
    }

    fn count(&self, asserts: bool) {
        let mut asserted = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        *asserted = if asserts { *asserted + 1 } else { asserted.saturating_sub(1) };
        // With the lock held, so that two levels cannot overtake each other.
        self.line.set(*asserted > 0);
    }
}

struct Source {
    shared: Arc<SharedLine>,
    level: AtomicBool,
}

impl Line for Source {
    fn set(&self, level: bool) {
        if self.level.swap(level, Ordering::AcqRel) != level {
            self.shared.count(level);
        }
    }

    fn trigger(&self) -> io::Result<Box<dyn LevelTrigger>> {
        // The machine itself adds its triggers to what others do to a line.
        self.shared.line.trigger()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::testing::wire;

    #[test]
    fn a_line_is_asserted_until_the_last_of_its_sources_lets_go() {
        let wire = wire();
        let shared = SharedLine::new(wire.clone());
        let (one, other) = (shared.source(), shared.source());
        one.set(true);
        one.set(true);
        other.set(true);
        one.set(false);
        assert!(wire.level());
        drop(other);
        assert!(!wire.level(), "who is gone asserts nothing");
        assert_eq!(wire.edges(), 1);
    }

    #[test]
    fn pins_rotate_with_the_number_of_their_device() {
        assert_eq!([1, 2, 3, 4].map(|device| swizzle(device, 0)), [1, 2, 3, 0]);
        assert_eq!([0, 1, 2, 3].map(|pin| swizzle(3, pin)), [3, 0, 1, 2]);
        assert_eq!([0, 1, 2, 3].map(|pin| root_line(1, pin, 8)), [1, 2, 3, 4]);
        assert_eq!(root_line(31, 3, 8), 2);
    }
}
