//! Guests that move, by `uvmm migrate`.
use std::process::{Child, Stdio};
use std::time::Duration;

use super::{Report, SHORT, Uvmm, Vm};
use crate::error::{Context, Error, Result};

impl Uvmm {
    /// Begins to migrate `from` to the VM that waits at `address`, with `more` on the command line;
    /// [`Report::of`] waits for the end.
    ///
    /// # Errors
    /// If uvmm cannot be started.
    pub fn begin_to_migrate(&self, from: &Vm, address: &str, more: &[&str]) -> Result<Child> {
        let mut command = self.command(["migrate", "--vm", &from.name, "--to", address, "--json"]);
        let child = command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.context(|| "cannot run uvmm migrate".into())
    }

    /// Migrates `from` to the VM that waits at `address`.
    ///
    /// # Errors
    /// If `uvmm migrate` does not end in time or says no report; a migration that failed has one.
    pub fn migrate(&self, from: &Vm, address: &str) -> Result<Report> {
        Report::of(self.begin_to_migrate(from, address, &[])?, Duration::from_secs(300))
    }

    /// Moves a guest to a new VM called `to`, which gets `devices`.
    ///
    /// # Errors
    /// If the migration does not complete, or the process that the guest left does not end well.
    pub fn move_on(&self, mut from: Vm, to: &str, devices: &[&str]) -> Result<(Vm, Report)> {
        let devices: Vec<_> = devices.iter().flat_map(|device| ["--device", device]).collect();
        let (vm, address) = self.incoming_with(to, &devices)?;
        let report = self.migrate(&from, &address)?;
        let status = (report.status == "completed").then(|| from.wait(SHORT)).transpose()?;
        if status.is_some_and(|status| status.success()) {
            return Ok((vm, report));
        }
        let errors = [from.errors()?, vm.errors()?].concat();
        Err(Error::Guest(format!("it did not arrive: {report:?}, {status:?}\n{errors}")))
    }
}
