//! A guest that rewrites and checks memory and reads its clocks, all the time.
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::{SHORT, Uvmm, Vm, variable};
use crate::error::{Error, Result};

impl Uvmm {
    /// Boots the lab's own Linux as `name`, which rewrites `mib` with `threads` from then on.
    ///
    /// # Errors
    /// If uvmm cannot be started, or the guest does not boot or does not work.
    pub fn working_guest(
        &self,
        name: &str,
        arguments: &[&str],
        mib: u32,
        threads: u32,
    ) -> Result<Vm> {
        let kernel = PathBuf::from(variable("GUEST_KERNEL")?);
        let mut vm = self.linux(name, &kernel, arguments)?;
        vm.booted()?;
        vm.says(&format!("guest-load {mib} {threads} /run/load & sleep 3; cat /run/load"))?;
        vm.pages_checked()?;
        Ok(vm)
    }
}

impl Vm {
    /// How much the guest's work has checked so far.
    ///
    /// # Errors
    /// If the work found anything wrong, or has ended.
    pub fn pages_checked(&mut self) -> Result<u64> {
        let (report, _) = self.shell("pidof guest-load >/dev/null && cat /run/load")?;
        let everything = self.serial.everything();
        if ["CORRUPT", "BACKWARDS"].iter().any(|wrong| everything.contains(wrong)) {
            return Err(Error::Guest(everything));
        }
        let pages = report.split_whitespace().find_map(|word| word.strip_prefix("pages="));
        let pages = pages.and_then(|pages| pages.parse().ok());
        pages.ok_or_else(|| Error::Guest(format!("the guest's work is gone: {report:?}")))
    }

    /// Waits until the guest's work has checked more than `before`; gives how much.
    ///
    /// # Errors
    /// As [`Vm::pages_checked`], and if it checks no more.
    pub fn works_on(&mut self, before: u64) -> Result<u64> {
        let deadline = Instant::now() + SHORT;
        loop {
            let now = self.pages_checked()?;
            if now > before {
                return Ok(now);
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout(format!("{}'s work stands still", self.name)));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}
