//! The PCI host bridge in AML (PCI Firmware 3.3, 4; ACPI 6.5, 6.2).

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Local, Method, Name, NotEqual, Or, Package, PackageBuilder, Path, ResourceTemplate,
    Return, Store, Uuid,
};
use devices::pci::{host, intx::root_line};

use super::layout;

/// `_OSC` of a PCI host bridge (PCI Firmware 3.3, 4.5.1).
const OSC: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What an OS must support to be granted anything: extended configuration space, ASPM, clock power
/// management and MSI. Linux asks for nothing unless it has all of them.
const SUPPORT_NEEDED: u32 = 0x17;
/// What is granted: hot-plug by SHPC, PME, AER, and the PCI Express capability, without which Linux
/// takes nothing.
const CONTROL_GRANTED: u32 = 0x1e;
// What `_OSC` answers in its first double word.
const FAILED: u32 = 1 << 1;
const UNKNOWN_UUID: u32 = 1 << 2;
const MASKED: u32 = 1 << 4;

/// The device `\_SB.PCI0` with its windows, of which the one above 4 GiB may be missing.
pub(super) fn host_bridge(memory_64: Option<&Range<u64>>) -> Vec<u8> {
    let mut aml = Vec::new();
    Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_SEG"), &0_u8),
            &Name::new(Path::new("_BBN"), &0_u8),
            &Resources(memory_64),
            &Name::new(Path::new("_PRT"), &routing()),
            &Control,
            // For an OS that finds no `_OSC` that it could use (PCI Firmware 3.3, 4.8): it may have
            // the hot-plug controllers, and there is nothing to be done for that.
            &Method::new(Path::new("OSHP"), 0, false, vec![]),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// `_CRS`: what the host bridge leads to.
struct Resources<'a>(Option<&'a Range<u64>>);

impl Aml for Resources<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let low = |address: u64| u32::try_from(address).expect("it lies below 4 GiB");
        let port = |port: u64| u16::try_from(port).expect("ports have 16 bits");
        let uncached = AddressSpaceCacheable::NotCacheable;
        let buses = AddressSpace::new_bus_number(0_u16, u16::from(layout::PCI_BUSES) - 1);
        let ports = u8::try_from(host::PORTS).expect("a few ports");
        let config = IO::new(port(host::PORT), port(host::PORT), 1, ports);
        let io =
            AddressSpace::new_io(port(layout::PCI_IO.start), port(layout::PCI_IO.end - 1), None);
        let Range { start, end } = layout::PCI_MEMORY;
        let memory = AddressSpace::new_memory(uncached, true, low(start), low(end - 1), None);
        let memory_64 = self.0.map(|Range { start, end }| {
            AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, *start, end - 1, None)
        });
        let mut parts: Vec<&dyn Aml> = vec![&buses, &config, &io, &memory];
        parts.extend(memory_64.iter().map(|window| -> &dyn Aml { window }));
        Name::new(Path::new("_CRS"), &ResourceTemplate::new(parts)).to_aml_bytes(sink);
    }
}

/// `_PRT`: which interrupt each pin of each device is wired to.
fn routing() -> PackageBuilder {
    let gsis = layout::PCI_GSIS;
    let lines = u8::try_from(gsis.len()).expect("a few lines");
    let mut package = PackageBuilder::new();
    for (device, pin) in (0..32_u8).flat_map(|device| (0..4_u8).map(move |pin| (device, pin))) {
        // All functions of the device.
        let address = u32::from(device) << 16 | 0xffff;
        let gsi = gsis.start + u32::from(root_line(device, pin, lines));
        package.add_element(&Package::new(vec![&address, &pin, &0_u8, &gsi]));
    }
    package
}

/// `_OSC`: what the OS may control itself.
///
/// One that lacks something it needs for that is told that there was a failure, as if there were no
/// `_OSC`: Linux without MSI then asks `OSHP` for the hot-plug controllers, and gets them.
struct Control;

impl Aml for Control {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let [status, support, control] = ["STAT", "SUPP", "CTRL"].map(Path::new);
        let fail = |why: u32| {
            let mut aml = Vec::new();
            Or::new(&status, &status, &why).to_aml_bytes(&mut aml);
            aml
        };
        let (failed, unknown) = (Raw(fail(FAILED)), Raw(fail(UNKNOWN_UUID)));
        let masked = Raw(fail(MASKED));
        Method::new(
            Path::new("_OSC"),
            4,
            true,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &0_u8),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(OSC)),
                    vec![
                        &CreateDWordField::new(&support, &Arg(3), &4_u8),
                        &CreateDWordField::new(&control, &Arg(3), &8_u8),
                        &And::new(&Local(0), &support, &SUPPORT_NEEDED),
                        &If::new(
                            &Equal::new(&Local(0), &SUPPORT_NEEDED),
                            vec![
                                &And::new(&Local(1), &control, &CONTROL_GRANTED),
                                &If::new(&NotEqual::new(&Local(1), &control), vec![&masked]),
                                &Store::new(&control, &Local(1)),
                            ],
                        ),
                        &Else::new(vec![&failed]),
                    ],
                ),
                &Else::new(vec![&unknown]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
