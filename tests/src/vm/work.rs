//! A guest that rewrites and checks memory and reads its clocks, all the time.
use std::thread;
use std::time::{Duration, Instant};

use super::{SHORT, Uvmm, Vm, own_kernel};
use crate::error::{Error, Result};

impl Uvmm {
    /// Boots the [`own_kernel`] as `name`, which rewrites `mib` with `threads` from then on.
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
        let mut vm = self.linux(name, &own_kernel()?, arguments)?;
        vm.booted()?;
        vm.works_with(mib, threads)?;
        Ok(vm)
    }
}

impl Vm {
    /// Has the guest rewrite `mib` with `threads` from now on, and waits until it does.
    ///
    /// # Errors
    /// If it does not, or finds anything wrong at once.
    pub fn works_with(&mut self, mib: u32, threads: u32) -> Result<()> {
        self.says(&format!("guest-load {mib} {threads} /run/load &"))?;
        self.until("[ -e /run/load ]")?;
        self.works_on(0).map(drop)
    }

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
