//! `uvmm plug` and `uvmm unplug`: give a running guest a device, and take it back.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use super::{Outcome, Vm, complain, duration, print};
use crate::config::{DeviceConfig, DeviceId};
use crate::control::{Request, SlotProgress};

/// What opening a device, giving it back and answering may take beside the guest's own time.
const OWN_TIME: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct PlugArgs {
    #[command(flatten)]
    vm: Vm,
    /// A device of the host: vfio,id=ID,host=BDF or a path below /sys[,slot=N][,strategy=S].
    #[arg(long, value_name = "DEVICE")]
    device: DeviceConfig,
    /// How long the guest may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
}

#[derive(Debug, Args)]
pub(super) struct UnplugArgs {
    #[command(flatten)]
    vm: Vm,
    /// What --device called it.
    id: DeviceId,
    /// How long the guest may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
}

impl PlugArgs {
    pub(super) fn plug(&self) -> Outcome {
        let (device, timeout_ms) = (self.device.clone(), millis(self.timeout));
        let request = Request::Plug { device, timeout_ms };
        let slot = converse(&self.vm, &request, &self.device.id, self.timeout)?;
        print(&format!("{} is in slot {slot}\n", self.device.id))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl UnplugArgs {
    pub(super) fn unplug(&self) -> Outcome {
        let request = Request::Unplug { id: self.id.clone(), timeout_ms: millis(self.timeout) };
        let slot = converse(&self.vm, &request, &self.id, self.timeout)?;
        print(&format!("{} is out of slot {slot}\n", self.id))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Asks, shows what the guest does, and gives the slot's number.
fn converse(
    vm: &Vm,
    request: &Request,
    id: &DeviceId,
    timeout: Duration,
) -> Result<u8, super::Failure> {
    let (limit, asked) = (timeout.saturating_add(OWN_TIME), Instant::now());
    let slot = vm.connect()?.converse(request, |progress: Option<SlotProgress>| {
        if let Some(progress) = progress {
            complain(&format!("{id}: {progress}"));
        }
        asked.elapsed() < limit
    })?;
    Ok(slot)
}
