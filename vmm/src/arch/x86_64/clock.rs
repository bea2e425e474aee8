//! The guest's clocks: KVM's clock, and the time-stamp counters that the guest measures it with.
//!
//! Both stand still while the guest does not run, but they are saved and set one after the other.
//! A guest compares them and calls a counter unstable that seems to have jumped. So the clock is
//! saved with the host's counter at the same instant, each vCPU with the distance of its counter
//! from the host's, and the destination moves the counters to where its clock came to be
//! (Linux, `Documentation/virt/kvm/devices/vcpu.rst`, 4.1).

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::VmFd;
use migration::state::Saved;
use serde::{Deserialize, Serialize};

use super::vcpu::is_same_tsc;
use crate::kvm::Error;

/// KVM's clock at an instant.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClockV1 {
    /// Nanoseconds that the guest has been up.
    nanoseconds: u64,
    /// The host's time-stamp counter then, where KVM's clock runs by it.
    host: Option<HostTsc>,
}

/// A host's time-stamp counter at an instant.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct HostTsc {
    ticks: u64,
    khz: u32,
}

impl Saved for ClockV1 {
    const KIND: &'static str = "kvm-clock";
    const VERSION: u16 = 1;
}

impl ClockV1 {
    /// The clock of a host like its own at another instant.
    pub(super) fn at(&self, nanoseconds: u64, ticks: u64) -> Self {
        Self { nanoseconds, host: self.host.map(|host| HostTsc { ticks, ..host }) }
    }

    /// How much further ahead of this host's counter a guest's counter must be than it was ahead
    /// of the other host's, modulo 2^64, to fit `here`, this host's clock once it was set from
    /// `self`.
    ///
    /// `None` where a clock does not run by its host's counter, or the two counters do not run at
    /// the same frequency.
    pub(crate) fn shift(&self, here: &Self) -> Option<u64> {
        let (from, to) = self.host.zip(here.host)?;
        if !is_same_tsc(to.khz.into(), from.khz.into()) {
            return None;
        }
        let passed = i128::from(here.nanoseconds) - i128::from(self.nanoseconds);
        let ticks = passed * i128::from(to.khz) / 1_000_000;
        // Less than 2^64 ns at less than 2^32 kHz: only the low 64 bits are of interest.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "modulo 2^64")]
        let ticks = ticks as u64;
        Some(from.ticks.wrapping_sub(to.ticks).wrapping_add(ticks))
    }
}

/// KVM's clock now, on a host whose time-stamp counter runs at `tsc_khz`.
pub(crate) fn read(fd: &VmFd, tsc_khz: u32) -> Result<ClockV1, Error> {
    let clock = fd.get_clock().map_err(Error::ioctl("KVM_GET_CLOCK"))?;
    let host = (clock.flags & KVM_CLOCK_HOST_TSC != 0)
        .then_some(HostTsc { ticks: clock.host_tsc, khz: tsc_khz });
    Ok(ClockV1 { nanoseconds: clock.clock, host })
}

/// Sets KVM's clock, and says what it is afterwards.
pub(crate) fn set(fd: &VmFd, to: &ClockV1, tsc_khz: u32) -> Result<ClockV1, Error> {
    let clock = kvm_clock_data { clock: to.nanoseconds, ..Default::default() };
    fd.set_clock(&clock).map_err(Error::ioctl("KVM_SET_CLOCK"))?;
    read(fd, tsc_khz)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn clock(nanoseconds: u64, ticks: u64, khz: u32) -> ClockV1 {
        ClockV1 { nanoseconds, host: Some(HostTsc { ticks, khz }) }
    }

    #[test]
    fn a_counter_keeps_its_place_beside_the_clock() {
        let there = clock(100 * SECOND, 7_000_000_000, 1_000_000);
        // Set two seconds ago here, by a host that has just started.
        let here = clock(102 * SECOND, 50, 1_000_000);
        let shift = there.shift(&here).unwrap();
        let offset = 3_000_u64;
        let guest_there = 7_000_000_000 + offset;
        let guest_here = 50_u64.wrapping_add(offset).wrapping_add(shift);
        assert_eq!(guest_here, guest_there + 2 * SECOND);
    }

    #[test]
    fn a_clock_that_stepped_back_takes_the_counters_along() {
        let there = clock(5_000, 1_000, 2_000_000);
        let here = clock(4_000, 1_000, 2_000_000);
        assert_eq!(there.shift(&here), Some(0_u64.wrapping_sub(2_000)));
    }

    #[test]
    fn without_a_common_counter_nothing_is_shifted() {
        let with = clock(1, 1, 1_000_000);
        let without = ClockV1 { nanoseconds: 1, host: None };
        assert_eq!(with.shift(&without), None);
        assert_eq!(without.shift(&with), None);
        assert_eq!(with.shift(&clock(1, 1, 2_000_000)), None);
    }
}
