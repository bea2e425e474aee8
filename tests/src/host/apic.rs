//! The local APIC of a processor of an emulated lab host (Intel SDM volume 3, chapter 13).
//!
//! QEMU loses an interrupt now and then that the APIC has handed to its processor: the processor
//! never hears of it, and the APIC waits for its end. It holds back all that are no more important
//! meanwhile, among them that of the processor's timer, so that whatever sleeps there sleeps on.

// UNSAFETY: a page of registers is mapped, and accessed as what it is.
#![expect(unsafe_code, reason = "registers are accessed by their address")]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::{NonNull, null_mut};

use rustix::fs::OFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Where each processor sees its own.
const ADDRESS: u64 = 0xfee0_0000;
const PAGE: usize = 4096;
/// End of interrupt.
const EOI: usize = 0xb0;
/// The interrupts in service, 32 in each of eight registers.
const ISR: usize = 0x100;
const STEP: usize = 0x10;
/// Sends the interrupt in its lowest byte; with this bit to the processor itself.
const ICR: usize = 0x300;
const TO_SELF: u32 = 1 << 18;
/// The first vector that an APIC takes.
const LEAST: u8 = 16;

/// The registers of the processor that whoever uses them runs on.
pub(super) struct LocalApic(NonNull<u32>);

impl LocalApic {
    /// Maps them, which the kernel allows with `iomem=relaxed`.
    pub(super) fn map() -> io::Result<Self> {
        let flags = i32::try_from(OFlags::SYNC.bits()).expect("a small flag");
        let memory =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/mem")?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping of a page of registers, which stays mapped: nothing else is there.
        let page = unsafe { mmap(null_mut(), PAGE, rights, MapFlags::SHARED, &memory, ADDRESS)? };
        NonNull::new(page.cast()).map(Self).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Interrupts the processor again by what is in service, if anything is; gives its vector.
    ///
    /// Whoever runs here outside the kernel was not interrupted by it, or has it behind: it is one
    /// that the processor never heard of. A device may wait for it to be heard of.
    pub(super) fn repeat_what_nobody_serves(&self) -> Option<u8> {
        let vector = in_service(|register| self.read(register))?;
        self.write(EOI, 0);
        if vector >= LEAST {
            self.write(ICR, TO_SELF | u32::from(vector));
        }
        Some(vector)
    }

    fn read(&self, register: usize) -> u32 {
        let register = self.0.as_ptr().wrapping_byte_add(register);
        // SAFETY: a register within the page, aligned; whatever it holds is a number.
        unsafe { register.read_volatile() }
    }

    fn write(&self, register: usize, value: u32) {
        let register = self.0.as_ptr().wrapping_byte_add(register);
        // SAFETY: as above; what the write makes the processor do leaves this process alone.
        unsafe { register.write_volatile(value) }
    }
}

/// The most important interrupt in service.
fn in_service(read: impl Fn(usize) -> u32) -> Option<u8> {
    (0..8_u8).rev().find_map(|index| {
        let bits = read(ISR + usize::from(index) * STEP);
        // All of them: there are no registers here.
        let highest = bits.checked_ilog2().filter(|_| bits != u32::MAX)?;
        u8::try_from(highest).ok().map(|bit| 32 * index + bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_important_interrupt_in_service_is_found() {
        let with = |bits: [(usize, u32); 2]| {
            in_service(|register| {
                bits.iter().filter(|(at, _)| *at == register).map(|(_, bits)| bits).sum()
            })
        };
        assert_eq!(with([(0x170, 1 << 12), (0x120, 0)]), Some(236));
        assert_eq!(with([(0x110, 1 << 5), (0x120, 1 | 1 << 31)]), Some(95));
        assert_eq!(with([(0x170, 0), (0x200, 1)]), None, "that is only asked for");
        assert_eq!(in_service(|_| u32::MAX), None);
    }
}
