//! The ACPI tables (ACPI 6.5): processors, interrupt controllers, the fixed hardware, the devices.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use devices::legacy::{pm, reset, rtc, serial};
use vm_memory::{Bytes, GuestAddress};

use super::{layout, pci_aml};
use crate::memory::Ram;

const OEM: [u8; 6] = *b"UVMM  ";
const OEM_TABLE: [u8; 8] = *b"UVMM    ";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header, the same for all (5.2.6).
const HEADER_BYTES: u32 = 36;

/// `IAPC_BOOT_ARCH` (5.2.9.3): legacy devices are there, no VGA to probe for; and, by what is not
/// set, no keyboard controller, whose probing would take a guest longer than anything else here.
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;

/// Interrupt flags of the MADT (5.2.12.5): as the bus has it; active high and level-triggered.
const BUS_DEFAULT: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// Writes the tables for `cpus` processors into `ram` and returns the address of their root.
///
/// `memory_64` is where PCI functions can be above RAM, if anywhere.
pub(crate) fn write(
    ram: &Ram,
    cpus: u8,
    memory_64: Option<&Range<u64>>,
) -> Result<u64, vm_memory::GuestMemoryError> {
    let mut area = Area { ram, root: layout::ACPI_TABLES, next: layout::ACPI_TABLES + 64 };
    let facs = area.put(&FACS::new())?;
    let dsdt = area.put_bytes(dsdt(cpus, memory_64).as_slice())?;
    let fadt = area.put(&fadt(facs, dsdt))?;
    let madt = area.put_bytes(madt(cpus).as_slice())?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, layout::PCI_BUSES - 1);
    let mcfg = area.put(&mcfg)?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    xsdt.add_entry(mcfg);
    let xsdt = area.put(&xsdt)?;
    ram.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(area.root))?;
    Ok(area.root)
}

/// The memory that the tables are written into, one after the other.
struct Area<'a> {
    ram: &'a Ram,
    root: u64,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, vm_memory::GuestMemoryError> {
        self.put_bytes(&bytes(table))
    }

    fn put_bytes(&mut self, table: &[u8]) -> Result<u64, vm_memory::GuestMemoryError> {
        let at = self.next;
        self.ram.write_slice(table, GuestAddress(at))?;
        // The FACS asks for 64 bytes (5.2.10), the others for less.
        self.next = (at + table.len() as u64).next_multiple_of(64);
        assert!(self.next <= layout::ACPI_TABLES_END, "eight processors' tables take 5 KiB");
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn io_port(port: u64) -> u16 {
    u16::try_from(port).expect("ports have 16 bits")
}

/// What there is beside the fixed hardware, in AML.
fn dsdt(cpus: u8, memory_64: Option<&Range<u64>>) -> Sdt {
    let mut aml = Vec::new();
    Name::new(Path::new("_S5_"), &Package::new(vec![&pm::S5, &0u8, &0u8, &0u8]))
        .to_aml_bytes(&mut aml);
    for cpu in 0..cpus {
        Device::new(
            Path::new(&format!("_SB_.C{cpu:03}")),
            vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &cpu)],
        )
        .to_aml_bytes(&mut aml);
    }
    let mut device = |name, id, port, ports, irq| {
        let (port, ports) = (io_port(port), u8::try_from(ports).expect("a few ports"));
        let io = IO::new(port, port, 1, ports);
        let interrupt = Interrupt::new(true, true, false, false, irq);
        Device::new(
            Path::new(name),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new(id)),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&io, &interrupt])),
            ],
        )
        .to_aml_bytes(&mut aml);
    };
    device("_SB_.COM1", "PNP0501", serial::PORT, serial::SIZE, serial::IRQ);
    device("_SB_.RTC_", "PNP0B00", rtc::PORT, rtc::SIZE, rtc::IRQ);
    aml.extend(pci_aml::host_bridge(memory_64));

    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// The fixed hardware (5.2.9): power button, sleep, reset.
fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    let low = |address: u64| u32::try_from(address).expect("the tables lie below 1 MiB");
    let io = |port, bits| GAS::new(AddressSpace::SystemIo, bits, 0, AccessSize::Undefined, port);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(low(facs))
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = low(dsdt).into();
    fadt.sci_int = u16::try_from(pm::SCI).expect("a legacy interrupt").into();
    fadt.pm1a_evt_blk = u32::from(io_port(pm::EVENTS_PORT)).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(pm::EVENTS_PORT, 32);
    fadt.pm1a_cnt_blk = u32::from(io_port(pm::CONTROL_PORT)).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(pm::CONTROL_PORT, 16);
    // Deeper sleep states than C1 are not there (5.2.9, P_LVL2_LAT and P_LVL3_LAT).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.century = rtc::CENTURY;
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, reset::PORT);
    fadt.reset_value = reset::SYSTEM_RESET | reset::RESET_CPU;
    fadt.finalize()
}

/// Processors and interrupt controllers (5.2.12).
fn madt(cpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", HEADER_BYTES + 8, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC);
    // PCAT_COMPAT: two 8259s are there as well.
    madt.write_u32(40, 1);
    for cpu in 0..cpus {
        // Processor local APIC, enabled (5.2.12.2).
        madt.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    // I/O APIC 0 for the interrupts from 0 on (5.2.12.3).
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    ioapic.extend([0; 4]);
    madt.append_slice(&ioapic);
    // The timer comes in at pin 2 (5.2.12.5), ACPI's own interrupt is level-triggered.
    for (irq, gsi, flags) in [(0, 2, BUS_DEFAULT), (9, pm::SCI, ACTIVE_HIGH_LEVEL)] {
        let mut source = vec![2, 10, 0, irq];
        source.extend(gsi.to_le_bytes());
        source.extend(flags.to_le_bytes());
        madt.append_slice(&source);
    }
    // LINT1 of every local APIC is the NMI (5.2.12.7).
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
    }

    #[test]
    fn an_os_finds_every_table_from_the_root_and_its_checksum_is_right() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let root = write(&ram, 8, Some(&(16 << 30..32 << 30))).unwrap();
        let read = |at, len| {
            let mut bytes = vec![0; len];
            ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let table = |at| {
            let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
            let bytes = read(at, len as usize);
            assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
            bytes
        };
        let address = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let rsdp = read(root, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(address(&rsdp[24..32]));
        let found: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(address(entry))).collect();
        assert_eq!(&found[0][..4], b"FACP");
        assert_eq!(&found[1][..4], b"APIC");
        assert_eq!(&found[2][..4], b"MCFG");
        assert_eq!(found[2][44..56], [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 15]);
        assert_eq!(&table(address(&found[0][140..148]))[..4], b"DSDT");
        let processors = found[1][44..].chunks(8).take_while(|entry| entry[0] == 0).count();
        assert_eq!(processors, 8);
    }
}
