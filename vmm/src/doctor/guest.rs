//! A guest of a few instructions, to see whether and how fast this KVM runs guests.
#![expect(unsafe_code, reason = "KVM is given memory")]
// UNSAFETY: KVM_SET_USER_MEMORY_REGION trusts its caller that the memory stays mapped.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: u64 = 64 << 10;
const CODE: u64 = 0x1000;
const WRITTEN: u64 = 0x2000;
const NEVER_TOUCHED: u64 = 0xf000;
/// Rounds of the loop, two instructions each.
const ROUNDS: u32 = 50_000;
const PORT: u16 = 0x80;

/// What the guest showed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// Instructions per second.
    pub(super) speed: u64,
    /// Whether the dirty log named the page that it wrote, and not one that it never touched.
    pub(super) dirty_log: bool,
}

#[derive(Debug, Error)]
pub(super) enum GuestError {
    #[error("cannot map {MEMORY} bytes of guest memory")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("KVM refused to {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    #[error("the vCPU stopped with {0}")]
    Exit(String),
}

/// `mov ecx, ROUNDS; 1: dec ecx; jnz 1b; mov [WRITTEN], al; out PORT, al; hlt`, in real mode.
fn program() -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0x66, 0x49, 0x75, 0xfc]);
    code.extend([0xa2, WRITTEN.to_le_bytes()[0], WRITTEN.to_le_bytes()[1]]);
    code.extend([0xe6, PORT.to_le_bytes()[0], 0xf4]);
    code
}

/// Runs the guest on a VM that has no memory and no interrupt controller yet.
pub(super) fn run(vm: &VmFd) -> Result<Seen, GuestError> {
    let refused = |what| move |error| GuestError::Kvm(what, error);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(
        GuestAddress(0),
        usize::try_from(MEMORY).expect("64 KiB fit"),
    )])
    .map_err(|e| GuestError::Memory(e.into()))?;
    memory.write_slice(&program(), GuestAddress(CODE)).map_err(|e| GuestError::Memory(e.into()))?;
    let host =
        memory.get_host_address(GuestAddress(0)).map_err(|e| GuestError::Memory(e.into()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: host as u64,
    };
    // SAFETY: `memory` maps these bytes until the end of this function, after the last run.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("take guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    // The first time also pays for faulting pages in.
    run_once(&mut vcpu)?;
    let took = run_once(&mut vcpu)?.max(Duration::from_nanos(1));
    let speed = u128::from(ROUNDS) * 2 * 1_000_000_000 / took.as_nanos();
    let size = usize::try_from(MEMORY).expect("64 KiB fit");
    let log = vm.get_dirty_log(0, size).map_err(refused("give its dirty log"))?;
    let named = log.first().copied().unwrap_or(0);
    // A log may name more than was written: a processor's walk of its tables counts on some.
    let dirty_log = named >> (WRITTEN >> 12) & 1 == 1 && named >> (NEVER_TOUCHED >> 12) & 1 == 0;
    Ok(Seen { speed: u64::try_from(speed).unwrap_or(u64::MAX), dirty_log })
}

fn run_once(vcpu: &mut VcpuFd) -> Result<Duration, GuestError> {
    let refused = |what| move |error| GuestError::Kvm(what, error);
    let mut sregs = vcpu.get_sregs().map_err(refused("give the vCPU's segments"))?;
    for segment in [&mut sregs.cs, &mut sregs.ds] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.set_sregs(&sregs).map_err(refused("set the vCPU's segments"))?;
    let mut regs = vcpu.get_regs().map_err(refused("give the vCPU's registers"))?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).map_err(refused("set the vCPU's registers"))?;
    let began = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => return Ok(began.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(GuestError::Exit(format!("{other:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(GuestError::Kvm("run the vCPU", error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn a_working_kvm_runs_the_guest_and_logs_the_one_page_it_wrote() {
        let vm = match Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(vm) => vm,
            Err(error) => return eprintln!("skipped: no usable KVM: {error}"),
        };
        let seen = run(&vm).unwrap();
        assert!(seen.dirty_log && seen.speed > 10_000, "{seen:?}");
    }
}
