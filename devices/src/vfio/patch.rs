//! What of a device's configuration space the guest must not see or change, in one place.
//!
//! VFIO itself keeps a guest from harming the host. What is here keeps the guest's view of its
//! machine in uvmm's hands: where the function answers, how it interrupts, what power state it is
//! in, and what capabilities it has. Whatever is not named here goes to the device and comes from
//! it.

use super::hardware::{CONFIG, Hardware, Interrupt};
use crate::pci::BarKind;
use crate::pci::bar::{self, Layout};
use crate::pci::capability::walk;
use crate::pci::msi::Msi;
use crate::pci::msix::{self, Capability};
use crate::pci::registers::{
    CAPABILITIES, COMMAND, CONVENTIONAL, EXTENDED, HEADER_TYPE, INTERRUPT_LINE, INTERRUPT_PIN,
    REVISION, Registers, STATUS, VENDOR_ID, command, status,
};

/// What becomes of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    /// It is as it was when the device was opened, and never changes.
    Constant,
    /// It is zero.
    Zero,
    /// Starts as zero; these bits of each byte are the guest's, and the device never sees them.
    Kept(u32),
    /// The device's own.
    Through,
}
use Treatment::{Constant, Kept, Through, Zero};

/// A register of the header: offset, bytes, what becomes of it.
struct Patch(u16, u16, Treatment);

/// The header (PCI 3.0, figure 6-1) but for its base address registers, capability pointer and
/// interrupt pin, which follow from the device.
const HEADER: [Patch; 13] = [
    // A virtual function's own reads as ones: VFIO knows the true one.
    Patch(VENDOR_ID, 4, Constant),
    // What the device gets of it depends on the bridges as well.
    Patch(COMMAND, 2, Kept(WRITABLE_COMMAND)),
    Patch(STATUS, 2, Through),
    Patch(REVISION, 4, Constant),
    // The cache line's size: nothing but a scratch register.
    Patch(0x0c, 1, Kept(0xff)),
    // Latency timer, header type (as one function), and the built-in self-test.
    Patch(0x0d, 1, Zero),
    Patch(HEADER_TYPE, 2, Zero),
    // CardBus, then the subsystem.
    Patch(0x28, 4, Zero),
    Patch(0x2c, 4, Constant),
    // No expansion ROM: nothing in a guest of uvmm boots from one.
    Patch(0x30, 4, Zero),
    Patch(0x35, 7, Zero),
    Patch(INTERRUPT_LINE, 1, Kept(0xff)),
    Patch(0x3e, 2, Constant),
];

const WRITABLE_COMMAND: u32 = (command::IO
    | command::MEMORY
    | command::MASTER
    | command::PARITY
    | command::SERR
    | command::INTX_DISABLE) as u32;

/// Capabilities that the guest sees (PCI Code and ID Assignment 1.11, 2); all others are hidden
/// with everything up to the next one, since nobody knows their length.
mod id {
    /// Ours: the device stays powered for as long as it is the guest's.
    pub(super) const POWER: u8 = 0x01;
    /// Through: VFIO emulates it.
    pub(super) const VITAL_PRODUCT_DATA: u8 = 0x03;
    /// Through.
    pub(super) use crate::pci::capability::id::VENDOR;
    /// Ours.
    pub(super) use crate::pci::capability::id::{MSI, MSIX};
    /// Through, but for the function-level reset.
    pub(super) const EXPRESS: u8 = 0x10;
    /// Through, but for the function-level reset.
    pub(super) const ADVANCED_FEATURES: u8 = 0x13;
}

/// Extended capabilities that the guest sees: the serial number, and two kinds of the vendor's
/// own. Not those that need the host's IOMMU, fabric or other functions: SR-IOV, ATS, PRI, PASID,
/// ARI, ACS, LTR, error reporting, resizable base address registers.
const EXTENDED_SHOWN: [u16; 3] = [0x0003, 0x000b, 0x0023];
/// What Linux skips: no capability has it (PCI Express 4.0, 7.9.1 reserves 0).
const NO_EXTENDED: u16 = 0xffff;

// PCI Power Management 1.2, 3.2: the specification's version alone is left of the capabilities.
const POWER_CAPABILITIES: u16 = 2;
const POWER_VERSION: u16 = 0x7;
const POWER_CONTROL: u16 = 4;
const POWER_STATE: u16 = 0x3;
const NO_SOFT_RESET: u16 = 1 << 3;

// PCI Express 4.0, 7.5.3.3 and 7.5.3.4.
const EXPRESS_CAPABILITIES: u16 = 4;
const EXPRESS_CAN_RESET: u32 = 1 << 28;
const EXPRESS_CONTROL_HIGH: u16 = 9;
const EXPRESS_RESET: u8 = 1 << 7;
// Conventional PCI ECN "Advanced Capabilities", 6.x.1.
const FEATURES: u16 = 3;
const FEATURES_CAN_RESET: u8 = 1 << 1;
const FEATURES_CONTROL: u16 = 4;
const FEATURES_RESET: u8 = 1 << 0;

/// A configuration space as the guest is to see it.
pub(super) struct Patched {
    /// What is ours of it.
    pub(super) registers: Registers,
    /// Which bytes are the device's.
    pub(super) through: Vec<bool>,
    pub(super) bars: Vec<Layout>,
    pub(super) msi: Option<Msi>,
    pub(super) msix: Option<Capability>,
    /// Where, and by which bits, the guest resets the function.
    pub(super) resets: Vec<(u16, u8)>,
}

/// Looks at all of the device's configuration space and makes the guest's view of it. What is not in
/// `original` the device does not have, be it less than there should be, as of mediated devices.
///
/// # Errors
/// Says what no guest could use.
pub(super) fn patch(hardware: &dyn Hardware, original: &[u8]) -> Result<Patched, &'static str> {
    let mut device = original.to_vec();
    device.resize(EXTENDED, 0);
    if device[usize::from(HEADER_TYPE)] & 0x7f != 0 {
        return Err("it is a bridge, and no ordinary function");
    }
    let mut space =
        Space { device, registers: Registers::new(EXTENDED), through: vec![false; EXTENDED] };
    for Patch(offset, len, treatment) in HEADER {
        space.apply(offset, len, treatment);
    }
    let has_pin = hardware.interrupts(Interrupt::Intx) > 0 && space.byte(INTERRUPT_PIN) != 0;
    space.registers.constant(INTERRUPT_PIN, u8::from(has_pin));
    let bars = space.bars(hardware)?;
    let conventional = u16::try_from(CONVENTIONAL).expect("256");
    // What is no capability may be registers that the device's driver knows.
    space.apply(0x40, conventional - 0x40, Through);
    let mut patched = Patched {
        registers: Registers::new(0),
        through: Vec::new(),
        bars,
        msi: None,
        msix: None,
        resets: Vec::new(),
    };
    space.capabilities(hardware, &mut patched)?;
    space.extended();
    space.through[original.len().min(EXTENDED)..].fill(false);
    (patched.registers, patched.through) = (space.registers, space.through);
    Ok(patched)
}

/// A view in the making.
struct Space {
    device: Vec<u8>,
    registers: Registers,
    through: Vec<bool>,
}

impl Space {
    fn byte(&self, offset: u16) -> u8 {
        self.device.get(usize::from(offset)).copied().unwrap_or(0)
    }

    fn word(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset + 1)])
    }

    fn dword(&self, offset: u16) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    fn apply(&mut self, offset: u16, len: u16, treatment: Treatment) {
        for (at, number) in (offset..offset + len).zip(0..) {
            self.through[usize::from(at)] = treatment == Through;
            match treatment {
                Constant => self.registers.constant(at, self.byte(at)),
                Kept(bits) => {
                    let [bits, ..] = (bits >> (8 * number)).to_le_bytes();
                    self.registers.writable(at, 0_u8, bits);
                }
                Zero | Through => self.registers.constant(at, 0_u8),
            }
        }
    }

    fn bars(&mut self, hardware: &dyn Hardware) -> Result<Vec<Layout>, &'static str> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < bar::COUNT {
            let register = self.dword(0x10 + 4 * u16::from(index));
            let size = hardware.region(index.into()).size;
            let (kind, takes) = match register & 0x7 {
                odd if odd & 1 == 1 => (BarKind::Io, 1),
                4 => (BarKind::Memory64, 2),
                _ => (BarKind::Memory32, 1),
            };
            if size > 0 {
                let prefetchable = register & 0x8 != 0;
                let bar = Layout::new(index, kind, prefetchable, size)
                    .map_err(|_| "a base address register has an impossible size")?;
                bar.define(&mut self.registers, 0);
                bars.push(bar);
                index += takes;
            } else {
                index += 1;
            }
        }
        Ok(bars)
    }

    fn capabilities(
        &mut self,
        hardware: &dyn Hardware,
        patched: &mut Patched,
    ) -> Result<(), &'static str> {
        if self.word(STATUS) & status::CAPABILITIES == 0 {
            return Ok(());
        }
        let found = walk(|offset| self.byte(offset));
        let mut link = CAPABILITIES;
        for (id, at) in &found {
            if !self.capability(*id, *at, hardware, patched)? {
                let others = found.iter().map(|(_, other)| *other).filter(|other| other > at);
                let end = others.min().unwrap_or(0x100);
                self.apply(*at, end - at, Zero);
                continue;
            }
            // The chain leads from one that is shown to the next.
            self.through[usize::from(*at)] = false;
            self.through[usize::from(at + 1)] = false;
            self.registers.constant(*at, *id);
            self.registers.constant(at + 1, 0_u8);
            self.registers.constant(link, u8::try_from(*at).map_err(|_| "it has too much")?);
            link = at + 1;
        }
        Ok(())
    }

    /// Makes the guest's view of a capability; says whether it sees it at all.
    fn capability(
        &mut self,
        id: u8,
        at: u16,
        hardware: &dyn Hardware,
        patched: &mut Patched,
    ) -> Result<bool, &'static str> {
        match id {
            id::POWER => {
                self.apply(at, 8, Zero);
                let version = self.word(at + POWER_CAPABILITIES) & POWER_VERSION;
                self.registers.constant(at + POWER_CAPABILITIES, version);
                self.registers.writable(at + POWER_CONTROL, NO_SOFT_RESET, POWER_STATE);
            }
            id::MSI => {
                let msi = Msi::of_control(at, self.word(at + 2));
                if hardware.interrupts(Interrupt::Msi) < msi.vectors().into() {
                    return Ok(false);
                }
                self.take(at, msi.length())?;
                msi.define(&mut self.registers);
                patched.msi = Some(msi);
            }
            id::MSIX => {
                let (control, table) = (self.word(at + 2), self.dword(at + 4));
                let msix = Capability::of_device(at, control, table, self.dword(at + 8));
                if hardware.interrupts(Interrupt::Msix) < msix.vectors.into() {
                    return Ok(false);
                }
                self.take(at, msix::CAPABILITY_LENGTH)?;
                msix.define(&mut self.registers);
                patched.msix = Some(msix);
            }
            id::EXPRESS => {
                let can = if hardware.can_reset() { EXPRESS_CAN_RESET } else { 0 };
                let capabilities = self.dword(at + EXPRESS_CAPABILITIES) & !EXPRESS_CAN_RESET | can;
                self.take(at + EXPRESS_CAPABILITIES, 4)?;
                self.registers.constant(at + EXPRESS_CAPABILITIES, capabilities);
                patched.resets.push((at + EXPRESS_CONTROL_HIGH, EXPRESS_RESET));
            }
            id::ADVANCED_FEATURES => {
                let can = if hardware.can_reset() { FEATURES_CAN_RESET } else { 0 };
                let features = self.byte(at + FEATURES) & !FEATURES_CAN_RESET | can;
                self.take(at + FEATURES, 1)?;
                self.registers.constant(at + FEATURES, features);
                patched.resets.push((at + FEATURES_CONTROL, FEATURES_RESET));
            }
            id::VITAL_PRODUCT_DATA | id::VENDOR => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Takes bytes of a capability from the device.
    fn take(&mut self, at: u16, len: u16) -> Result<(), &'static str> {
        if usize::from(at + len) > CONVENTIONAL {
            return Err("a capability passes the end of its configuration space");
        }
        self.apply(at, len, Zero);
        Ok(())
    }

    /// Shows the extended capabilities that a guest may see (PCI Express 4.0, 7.6.3).
    fn extended(&mut self) {
        let (mut at, mut link, mut steps) = (0x100_u16, None, 0);
        while (0x100..=0xffc).contains(&at) && self.dword(at) != 0 && steps < 960 {
            let (id, next) = (self.word(at), (self.word(at + 2) >> 4) & !3);
            if EXTENDED_SHOWN.contains(&id) {
                let version = self.word(at + 2) & 0xf;
                let len = match id {
                    // The serial number, and the length that vendors write after the header.
                    0x0003 => 12,
                    _ => (self.word(at + 6) >> 4).clamp(8, 0x1000 - at),
                };
                self.apply(at + 4, len.min(0x1000 - at) - 4, Through);
                self.registers.constant(at, id);
                self.registers.constant(at + 2, version);
                if let Some((link, version)) = link.replace((at, version)) {
                    self.registers.constant(link + 2, at << 4 | version);
                } else if at != 0x100 {
                    // The first header is always read: it leads to the first that is shown.
                    self.registers.constant(0x100, NO_EXTENDED);
                    self.registers.constant(0x102, at << 4 | 1);
                }
            }
            (at, steps) = (next, steps + 1);
        }
    }
}

/// Reads all of the device's configuration space.
pub(super) fn read_all(hardware: &dyn Hardware) -> std::io::Result<Vec<u8>> {
    let size = usize::try_from(hardware.region(CONFIG).size).unwrap_or(EXTENDED).min(EXTENDED);
    let mut bytes = vec![0; size];
    for (offset, chunk) in (0..).step_by(4).zip(bytes.chunks_mut(4)) {
        hardware.read(CONFIG, offset, chunk)?;
    }
    Ok(bytes)
}
