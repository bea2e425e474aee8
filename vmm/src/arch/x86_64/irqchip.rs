//! The PC's interrupt controllers and timer inside KVM: two PICs, the I/O APIC, the PIT.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use migration::state::Saved;
use serde::{Deserialize, Serialize};

use crate::kvm::{Error, exact};

/// How many pins the I/O APIC has: as many global system interrupts are wired to something.
pub(crate) const PINS: u32 = 24;
/// How many of them reach a PIC as well, eight each.
const PIC_PINS: u32 = 16;

/// How the pins are wired when KVM makes the controllers: each to the I/O APIC's pin of its number,
/// and the first sixteen to the PICs.
pub(crate) fn routes() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pic = |gsi| match gsi {
        0..8 => entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    };
    let pics = (0..PIC_PINS).map(pic);
    pics.chain((0..PINS).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi))).collect()
}

/// The saved form: the kernel's own structures.
#[derive(Serialize, Deserialize)]
pub(crate) struct IrqchipV1 {
    #[serde(with = "exact")]
    pit: kvm_pit_state2,
    #[serde(with = "exact")]
    pic_master: kvm_irqchip,
    #[serde(with = "exact")]
    pic_slave: kvm_irqchip,
    #[serde(with = "exact")]
    ioapic: kvm_irqchip,
}

impl Saved for IrqchipV1 {
    const KIND: &'static str = "kvm-irqchip";
    const VERSION: u16 = 1;
}

/// Reads the controllers. No vCPU may run.
pub(crate) fn save(fd: &VmFd) -> Result<IrqchipV1, Error> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        fd.get_irqchip(&mut chip).map_err(Error::ioctl("KVM_GET_IRQCHIP"))?;
        Ok(chip)
    };
    Ok(IrqchipV1 {
        pit: fd.get_pit2().map_err(Error::ioctl("KVM_GET_PIT2"))?,
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
    })
}

/// Writes the controllers, the I/O APIC last: the local APICs and all lines are then in place.
pub(crate) fn load(fd: &VmFd, state: &IrqchipV1) -> Result<(), Error> {
    let IrqchipV1 { pit, pic_master, pic_slave, ioapic } = state;
    fd.set_pit2(pit).map_err(Error::ioctl("KVM_SET_PIT2"))?;
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, pic_master),
        (KVM_IRQCHIP_PIC_SLAVE, pic_slave),
        (KVM_IRQCHIP_IOAPIC, ioapic),
    ];
    for (chip_id, chip) in chips {
        // Which chip it is follows from the field, not from the peer.
        let chip = kvm_irqchip { chip_id, ..*chip };
        fd.set_irqchip(&chip).map_err(Error::ioctl("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}
