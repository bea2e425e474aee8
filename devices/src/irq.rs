//! Interrupts as a device sees them.

/// One interrupt input of the machine, as its device sees it.
pub trait Line: Send + Sync {
    /// Drives the line: `true` asserts it, until `false`.
    ///
    /// May be called from any thread, also with the level that the line has already, and with the
    /// caller's registers locked: it may neither wait nor call a device.
    fn set(&self, level: bool);

    /// Makes one edge, for inputs that are triggered by edges.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}
