//! All of a vCPU that its guest could tell, in the order in which KVM can give and take it.

// UNSAFETY: KVM writes as many bytes of extended state as it announced, not as many as it is told.
#![expect(unsafe_code, reason = "KVM_GET_XSAVE2 and KVM_SET_XSAVE trust the buffer's size")]

use std::collections::BTreeMap;

use kvm_bindings::{
    CpuId, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use migration::state::Saved;
use serde::{Deserialize, Serialize};

use super::feature::Features;
use super::{cpuid, extended, msr};
use crate::kvm::{Error, exact, tsc};

/// 32-bit words of extended state that every KVM uses at least (`struct kvm_xsave`).
const XSAVE_WORDS: usize = 1024;
/// The timer mode in the local APIC's timer entry (SDM vol. 3, 11.5.1), and deadline mode.
const LVT_TIMER: usize = 0x320;
const TIMER_MODE: u32 = 0b11 << 17;
const TIMER_DEADLINE: u32 = 0b10 << 17;
/// KVM takes a frequency that differs by less as the same (KVM's default `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// The saved form.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuV1 {
    #[serde(with = "exact")]
    mp_state: kvm_mp_state,
    #[serde(with = "exact")]
    regs: kvm_regs,
    #[serde(with = "exact")]
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    #[serde(with = "exact")]
    xcrs: kvm_xcrs,
    #[serde(with = "exact")]
    debugregs: kvm_debugregs,
    #[serde(with = "exact")]
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    /// What its time-stamp counter is ahead of the host's, where KVM tells.
    tsc_offset: Option<u64>,
    cpuid: Vec<Leaf>,
    msrs: Vec<(u32, u64)>,
    #[serde(with = "exact")]
    events: kvm_vcpu_events,
}

impl Saved for VcpuV1 {
    const KIND: &'static str = "kvm-vcpu";
    const VERSION: u16 = 1;
}

impl VcpuV1 {
    /// What its guest sees.
    ///
    /// # Errors
    /// It shows features that a host which can show `host` lacks, or more leaves than KVM takes.
    pub(crate) fn seen(&self, host: &CpuId) -> Result<Seen, Error> {
        let cpuid = self.cpuid()?;
        let lacking = Features::of(&cpuid).lasting().without(Features::of(host)).names();
        if !lacking.is_empty() {
            let model = "that the guest knows".to_owned();
            return Err(Error::CpuLacks { model, lacking: lacking.join(", ") });
        }
        Ok(Seen { cpuid, tsc_khz: self.tsc_khz })
    }

    /// What CPUID answers on it.
    pub(super) fn cpuid(&self) -> Result<CpuId, Error> {
        let leaves: Vec<_> = self.cpuid.iter().map(|Leaf(entry)| *entry).collect();
        CpuId::from_entries(&leaves).map_err(|_| Error::TooManyCpuidEntries(leaves.len()))
    }

    /// Its model-specific registers, with their values.
    pub(super) fn msrs(&self) -> BTreeMap<u32, u64> {
        self.msrs.iter().copied().collect()
    }

    /// What its time-stamp counter was ahead of its host's, modulo 2^64, if it runs at a host's
    /// own frequency.
    pub(crate) fn unscaled_tsc_offset(&self, host_khz: u32) -> Option<u64> {
        self.tsc_offset.filter(|_| is_same_tsc(host_khz.into(), self.tsc_khz.into()))
    }
}

/// What a guest sees of its processors that does not change.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// What CPUID answers on its first vCPU.
    pub(crate) cpuid: CpuId,
    /// The frequency of its time-stamp counters.
    pub(crate) tsc_khz: u32,
}

#[derive(Serialize, Deserialize)]
struct Leaf(#[serde(with = "exact")] kvm_cpuid_entry2);

/// Bytes of extended state that this host's KVM keeps for a vCPU.
pub(crate) fn xsave_bytes(kvm: &Kvm) -> usize {
    // 0 where the capability is not known: the state then has the size that it always had.
    usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_WORDS * 4)
}

/// Bytes of extended state of a vCPU that `cpuid` tells of, in the form that KVM keeps it.
pub(crate) fn guest_xsave_bytes(cpuid: &CpuId) -> usize {
    usize::try_from(extended::bytes(cpuid)).unwrap_or(usize::MAX).max(XSAVE_WORDS * 4)
}

/// The model-specific registers of a vCPU, with their values.
pub(crate) fn msrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<(u32, u64)>, Error> {
    let cpuid = cpuid::shown(fd)?;
    msr::read(fd, &msr::of_guest(kvm, &cpuid)?)
}

/// Reads a vCPU that is out of the guest and has no half-done exit.
pub(crate) fn save(kvm: &Kvm, fd: &VcpuFd) -> Result<VcpuV1, Error> {
    let cpuid = cpuid::shown(fd)?;
    // First, as it can take in a pending INIT and so change what is read after it.
    let mp_state = fd.get_mp_state().map_err(Error::ioctl("KVM_GET_MP_STATE"))?;
    // Before CR2 and DR6 are read: KVM delivers the payload of a pending exception to them here.
    let events = fd.get_vcpu_events().map_err(Error::ioctl("KVM_GET_VCPU_EVENTS"))?;
    let regs = fd.get_regs().map_err(Error::ioctl("KVM_GET_REGS"))?;
    let sregs = fd.get_sregs().map_err(Error::ioctl("KVM_GET_SREGS"))?;
    let xsave = save_xsave(kvm, fd, &cpuid)?;
    let xcrs = fd.get_xcrs().map_err(Error::ioctl("KVM_GET_XCRS"))?;
    let debugregs = fd.get_debug_regs().map_err(Error::ioctl("KVM_GET_DEBUGREGS"))?;
    let lapic = fd.get_lapic().map_err(Error::ioctl("KVM_GET_LAPIC"))?;
    let tsc_khz = fd.get_tsc_khz().map_err(Error::ioctl("KVM_GET_TSC_KHZ"))?;
    let mut msrs = msr::read(fd, &msr::of_guest(kvm, &cpuid)?)?;
    keep_expired_deadline(&lapic, &mut msrs);
    let cpuid = cpuid.as_slice().iter().map(|&leaf| Leaf(leaf)).collect();
    Ok(VcpuV1 {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debugregs,
        lapic,
        tsc_khz,
        tsc_offset: tsc::offset(fd)?,
        cpuid,
        msrs,
        events,
    })
}

/// Makes a new vCPU what `state` says; gives the registers that are still to be written before it
/// runs. Until then nothing writes to guest memory, which another process may have back.
pub(crate) fn load(kvm: &Kvm, fd: &VcpuFd, state: VcpuV1) -> Result<Vec<(u32, u64)>, Error> {
    let leaves = state.cpuid()?;
    let VcpuV1 {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debugregs,
        lapic,
        tsc_khz,
        tsc_offset: _needs_the_clock,
        cpuid: _as_leaves,
        msrs,
        events,
    } = state;
    // All later checks depend on it.
    fd.set_cpuid2(&leaves).map_err(Error::ioctl("KVM_SET_CPUID2"))?;
    load_tsc_khz(fd, tsc_khz)?;
    fd.set_mp_state(mp_state).map_err(Error::ioctl("KVM_SET_MP_STATE"))?;
    // Clears pending exceptions, so before the events.
    fd.set_regs(&regs).map_err(Error::ioctl("KVM_SET_REGS"))?;
    fd.set_sregs(&sregs).map_err(Error::ioctl("KVM_SET_SREGS"))?;
    load_xsave(kvm, fd, &xsave)?;
    fd.set_xcrs(&xcrs).map_err(Error::ioctl("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&debugregs).map_err(Error::ioctl("KVM_SET_DEBUGREGS"))?;
    // After the APIC base, which is in the special registers; before the deadline, which counts
    // only in deadline mode.
    fd.set_lapic(&lapic).map_err(Error::ioctl("KVM_SET_LAPIC"))?;
    let (later, now): (Vec<_>, _) =
        msrs.into_iter().partition(|&(index, _)| msr::writes_memory(index));
    msr::write(fd, &now)?;
    fd.set_vcpu_events(&events).map_err(Error::ioctl("KVM_SET_VCPU_EVENTS"))?;
    Ok(later)
}

impl VcpuV1 {
    /// The state of a vCPU that has not run since it was loaded, and so lacks the registers `later`.
    pub(crate) fn with(mut self, later: &[(u32, u64)]) -> Self {
        put_in(&mut self.msrs, later);
        self
    }
}

fn put_in(msrs: &mut [(u32, u64)], later: &[(u32, u64)]) {
    for (index, value) in msrs {
        if let Some((_, held)) = later.iter().find(|(held, _)| held == index) {
            *value = *held;
        }
    }
}

/// Tells a guest that it did not run for a while, so that it does not report a lockup.
pub(crate) fn note_pause(fd: &VcpuFd) {
    // EINVAL: this guest has no KVM clock, and so no such watchdog either.
    if let Err(error) = fd.kvmclock_ctrl() {
        tracing::trace!(%error, "KVM_KVMCLOCK_CTRL");
    }
}

/// A deadline that has passed reads as 0 even if its interrupt was not delivered yet: a deadline
/// of now fires it on the other side.
fn keep_expired_deadline(lapic: &kvm_lapic_state, msrs: &mut [(u32, u64)]) {
    let timer = lapic.regs[LVT_TIMER..LVT_TIMER + 4].iter().rev();
    let timer = timer.fold(0, |word, &byte| word << 8 | u32::from(byte.cast_unsigned()));
    if timer & TIMER_MODE != TIMER_DEADLINE {
        return;
    }
    let now = msrs.iter().find(|(index, _)| *index == msr::TSC).map(|&(_, tsc)| tsc);
    let deadline = msrs.iter_mut().find(|(index, _)| *index == msr::TSC_DEADLINE);
    if let (Some(now), Some((_, deadline @ 0))) = (now, deadline) {
        *deadline = now;
    }
}

/// Whether KVM takes two frequencies of a TSC as the same.
pub(crate) fn is_same_tsc(here_khz: u64, wanted_khz: u64) -> bool {
    here_khz.abs_diff(wanted_khz) <= here_khz.saturating_mul(TSC_TOLERANCE_PPM) / 1_000_000
}

fn load_tsc_khz(fd: &VcpuFd, wanted: u32) -> Result<(), Error> {
    let here = fd.get_tsc_khz().map_err(Error::ioctl("KVM_GET_TSC_KHZ"))?;
    if is_same_tsc(here.into(), wanted.into()) {
        return Ok(());
    }
    fd.set_tsc_khz(wanted).map_err(|source| Error::TscFrequency { here, wanted, source })
}

fn xsave_buffer(kvm: &Kvm) -> Xsave {
    let extra = xsave_bytes(kvm).div_ceil(4) - XSAVE_WORDS;
    Xsave::new(extra).expect("KVM's own size is within the wrapper's limit")
}

/// The extended state of what `cpuid` tells of.
fn save_xsave(kvm: &Kvm, fd: &VcpuFd, cpuid: &CpuId) -> Result<Vec<u32>, Error> {
    let mut buffer = xsave_buffer(kvm);
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 announces.
    unsafe { fd.get_xsave2(&mut buffer) }.map_err(Error::ioctl("KVM_GET_XSAVE2"))?;
    let legacy = buffer.as_fam_struct_ref().xsave.region;
    let mut state: Vec<u32> = legacy.iter().chain(buffer.as_slice()).copied().collect();
    keep_parts(&mut state, cpuid);
    Ok(state)
}

/// Leaves out of an XSAVE area what the guest cannot have: before Linux 6.6 KVM gives the host's
/// parts too.
fn keep_parts(state: &mut Vec<u32>, cpuid: &CpuId) {
    /// The two words that tell which parts are not in their initial state (SDM vol. 1, 13.4.2).
    const USED: usize = 512 / 4;
    /// The parts that FXSAVE has.
    const LEGACY: u64 = 0b11;
    let parts = extended::user_parts(cpuid) | LEGACY;
    for (word, parts) in state[USED..].iter_mut().zip(extended::halves(parts)) {
        *word &= parts;
    }
    state.truncate(guest_xsave_bytes(cpuid).div_ceil(4));
}

fn load_xsave(kvm: &Kvm, fd: &VcpuFd, state: &[u32]) -> Result<(), Error> {
    let mut buffer = xsave_buffer(kvm);
    let want = XSAVE_WORDS + buffer.as_slice().len();
    let Some((legacy, extra)) = state.split_at_checked(XSAVE_WORDS).filter(|_| state.len() <= want)
    else {
        return Err(Error::XsaveSize { want: want * 4, found: state.len() * 4 });
    };
    // SAFETY: no length is changed, only words within it.
    unsafe { buffer.as_mut_fam_struct() }.xsave.region.copy_from_slice(legacy);
    // What the guest's processors have no room for is in its initial state.
    buffer.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 announces.
    unsafe { fd.set_xsave2(&buffer) }.map_err(Error::ioctl("KVM_SET_XSAVE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lapic(timer: u32) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (register, byte) in lapic.regs[LVT_TIMER..].iter_mut().zip(timer.to_le_bytes()) {
            *register = byte.cast_signed();
        }
        lapic
    }

    #[test]
    fn what_is_still_to_be_written_is_saved_as_if_it_had_been() {
        let (kvm_clock, others) = (0x4b56_4d01, [(msr::TSC, 7), (0x277, 9)]);
        let read = [others[0], others[1], (kvm_clock, 0)];
        let mut msrs = read;
        put_in(&mut msrs, &[]);
        assert_eq!(msrs, read, "of a vCPU that has run");
        put_in(&mut msrs, &[(kvm_clock, 0x1001)]);
        assert_eq!(msrs, [others[0], others[1], (kvm_clock, 0x1001)]);
        assert!(msr::writes_memory(kvm_clock) && others.iter().all(|m| !msr::writes_memory(m.0)));
    }

    #[test]
    fn an_expired_deadline_fires_on_the_other_side() {
        let mut msrs = [(msr::TSC, 5000), (msr::TSC_DEADLINE, 0)];
        keep_expired_deadline(&lapic(TIMER_DEADLINE | 0xec), &mut msrs);
        assert_eq!(msrs[1], (msr::TSC_DEADLINE, 5000));
    }

    #[test]
    fn a_deadline_to_come_stays_and_other_modes_have_none() {
        let mut armed = [(msr::TSC, 5000), (msr::TSC_DEADLINE, 9000)];
        keep_expired_deadline(&lapic(TIMER_DEADLINE), &mut armed);
        assert_eq!(armed[1].1, 9000);
        let mut periodic = [(msr::TSC, 5000), (msr::TSC_DEADLINE, 0)];
        keep_expired_deadline(&lapic(0b01 << 17), &mut periodic);
        assert_eq!(periodic[1].1, 0);
    }

    #[test]
    fn extended_state_that_the_guest_cannot_have_stays_behind() {
        let leaf = |index, eax, ebx| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            eax,
            ebx,
            ..Default::default()
        };
        let cpuid = CpuId::from_entries(&[leaf(0, 0b111, 576), leaf(2, 256, 576)]).unwrap();
        let mut state = vec![0xffff_ffff; 2 * XSAVE_WORDS];
        keep_parts(&mut state, &cpuid);
        assert_eq!(state.len(), XSAVE_WORDS);
        assert_eq!(state[127..131], [u32::MAX, 0b111, 0, u32::MAX]);
        let large = CpuId::from_entries(&[leaf(0, 1 << 18, 576), leaf(18, 8192, 2816)]).unwrap();
        let mut state = vec![0; 3 * XSAVE_WORDS];
        keep_parts(&mut state, &large);
        assert_eq!(state.len() * 4, 2816 + 8192);
    }
}
