//! The host bridge: a function of its own, and the two ways into configuration space.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::state::{Format, Migratable, Saved, StateError, StateReader, StateWriter};
use serde::{Deserialize, Serialize};

use super::registers::{
    COMMAND, CONVENTIONAL, DEVICE_ID, HEADER_TYPE, REVISION, Registers, RegistersV1, VENDOR_ID,
    command,
};
use super::topology::Topology;
use super::{Bar, Effect, PciFunction};
use crate::bus::BusDevice;
use crate::irq::Line;

/// `CONFIG_ADDRESS`, then `CONFIG_DATA` (PCI 3.0, 3.2.2.3.2).
pub const PORT: u64 = 0xcf8;
/// How many ports the two take.
pub const PORTS: u64 = 8;
/// Bytes of the enhanced access mechanism for one bus (PCI Express 4.0, 7.2.2).
pub const ECAM_BUS: u64 = 1 << 20;

/// Red Hat's identifier of a host bridge that no hardware has (QEMU's generic one).
pub const IDENTITY: (u16, u16) = (0x1b36, 0x0008);
/// What the host bridge is saved as.
pub const FORMAT: Format = Format::of::<HostBridgeV1>();
/// What its configuration ports is saved as.
pub const PORTS_FORMAT: Format = Format::of::<ConfigPortsV1>();
const CLASS: u32 = 0x06_00_00 << 8;

const DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// The host bridge as a function of its own root bus, which does nothing.
pub struct HostBridge {
    registers: Mutex<Registers>,
}

impl HostBridge {
    /// As after power-on.
    #[must_use]
    pub fn new() -> Self {
        let mut registers = Registers::new(CONVENTIONAL);
        registers.constant(VENDOR_ID, IDENTITY.0);
        registers.constant(DEVICE_ID, IDENTITY.1);
        registers.writable(COMMAND, command::MEMORY | command::MASTER, command::SERR);
        registers.constant(REVISION, CLASS);
        registers.constant(HEADER_TYPE, 0_u8);
        Self { registers: Mutex::new(registers) }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Effect {
        self.lock().write(offset, data);
        Effect::None
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn read_bar(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn write_bar(&self, _bar: u8, _offset: u64, _data: &[u8]) -> Effect {
        Effect::None
    }

    fn place_bar(&self, _bar: u8, _at: Option<u64>) {}

    fn allow_bus_master(&self, _allowed: bool) {}

    fn wire(&self, _intx: Arc<dyn Line>) {}

    fn reset(&self) {
        self.lock().reset();
    }
}

#[derive(Serialize, Deserialize)]
struct HostBridgeV1 {
    registers: RegistersV1,
}

impl Saved for HostBridgeV1 {
    const KIND: &'static str = "pci-host-bridge";
    const VERSION: u16 = 1;
}

impl Migratable for HostBridge {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let registers = self.lock().save();
        out.put(&HostBridgeV1 { registers })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let HostBridgeV1 { registers } = from.take()?;
        self.lock().load(&registers).map_err(StateError::invalid::<HostBridgeV1>)
    }
}

/// Configuration mechanism #1: [`PORTS`] ports at [`PORT`].
pub struct ConfigPorts {
    topology: Arc<Topology>,
    /// The PC has its reset control in the middle of `CONFIG_ADDRESS`; that is a register of double
    /// words only, and everything narrower is this one's.
    reset: Arc<dyn BusDevice>,
    address: Mutex<u32>,
}

/// Where the reset control lies within the ports.
const RESET: u64 = 1;

impl ConfigPorts {
    /// The way to `topology`, with `reset` answering single bytes at port 0xcf9.
    #[must_use]
    pub fn new(topology: Arc<Topology>, reset: Arc<dyn BusDevice>) -> Self {
        Self { topology, reset, address: Mutex::new(0) }
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bus, device and function, and register that an access at `offset` is to.
    fn target(&self, offset: u64) -> Option<(u8, u8, u16)> {
        let address = *self.address();
        let [register, devfn, bus, _] = address.to_le_bytes();
        let byte = u16::try_from(offset.checked_sub(DATA)?).ok()?;
        (address & ENABLE != 0).then(|| (bus, devfn, u16::from(register & 0xfc) + byte))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((bus, devfn, register)) = self.target(offset) {
            self.topology.read_config(bus, devfn, register, data);
        } else if offset == 0 && data.len() == 4 {
            let address = *self.address();
            data.copy_from_slice(&address.to_le_bytes());
        } else if offset == RESET && data.len() == 1 {
            self.reset.read(0, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, devfn, register)) = self.target(offset) {
            self.topology.write_config(bus, devfn, register, data);
        } else if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            *self.address() = u32::from_le_bytes(address) & ADDRESS_WRITABLE;
        } else if offset == RESET && data.len() == 1 {
            self.reset.write(0, data);
        }
    }
}

#[derive(Serialize, Deserialize)]
struct ConfigPortsV1 {
    address: u32,
}

impl Saved for ConfigPortsV1 {
    const KIND: &'static str = "pci-config-ports";
    const VERSION: u16 = 1;
}

impl Migratable for ConfigPorts {
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        let address = *self.address();
        out.put(&ConfigPortsV1 { address })
    }

    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        let ConfigPortsV1 { address } = from.take()?;
        if address & !ADDRESS_WRITABLE != 0 {
            return Err(StateError::invalid::<ConfigPortsV1>("reserved bits are set"));
        }
        *self.address() = address;
        Ok(())
    }
}

/// The enhanced access mechanism: [`ECAM_BUS`] bytes for each bus from 0 on.
pub struct Ecam {
    topology: Arc<Topology>,
}

impl Ecam {
    /// The way to `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>) -> Self {
        Self { topology }
    }
}

/// Bus, device and function, and register at `offset`; none for an access to two functions.
fn ecam_target(offset: u64, length: usize) -> Option<(u8, u8, u16)> {
    let [b0, b1, b2, ..] = offset.to_le_bytes();
    let register = u16::from_le_bytes([b0, b1 & 0xf]);
    let bus = u8::try_from(offset >> 20).ok()?;
    let devfn = b1 >> 4 | (b2 & 0xf) << 4;
    let fits = usize::from(register) + length <= super::registers::EXTENDED;
    fits.then_some((bus, devfn, register))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((bus, devfn, register)) = ecam_target(offset, data.len()) {
            self.topology.read_config(bus, devfn, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, devfn, register)) = ecam_target(offset, data.len()) {
            self.topology.write_config(bus, devfn, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use migration::state::testing::assert_round_trip;

    use super::super::topology::{Place, ROOT, Surroundings};
    use super::*;
    use crate::legacy::testing::wire;

    struct Byte(Mutex<u8>);

    impl BusDevice for Byte {
        fn read(&self, _: u64, data: &mut [u8]) {
            data[0] = *self.0.lock().unwrap();
        }

        fn write(&self, _: u64, data: &[u8]) {
            *self.0.lock().unwrap() = data[0];
        }
    }

    fn ports() -> ConfigPorts {
        let topology = Topology::new(Surroundings {
            pio: Weak::new(),
            mmio: Weak::new(),
            io_windows: Vec::new(),
            memory_windows: Vec::new(),
            lines: vec![wire()],
        });
        topology.insert(Place::new(ROOT, 0, 0), Arc::new(HostBridge::new())).unwrap();
        ConfigPorts::new(topology, Arc::new(Byte(Mutex::new(0))))
    }

    fn read<const N: usize>(device: &impl BusDevice, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn an_address_then_data_reach_a_register() {
        let ports = ports();
        ports.write(0, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(read(&ports, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&ports, 6), [0x08, 0x00]);
        ports.write(0, &0x8000_0008_u32.to_le_bytes());
        assert_eq!(read(&ports, 7), [0x06], "the base class of a bridge");
        ports.write(0, &0x8000_0004_u32.to_le_bytes());
        ports.write(5, &[0xff]);
        assert_eq!(read(&ports, 4), [0x06, 0x01]);
    }

    #[test]
    fn where_there_is_no_function_all_ones_are_read() {
        let ports = ports();
        for address in [0x8000_0800_u32, 0x8000_0100, 0x8001_0000, 0x0000_0000] {
            ports.write(0, &address.to_le_bytes());
            assert_eq!(read(&ports, 4), [0xff; 4], "{address:#x}");
            ports.write(4, &[0; 4]);
        }
    }

    #[test]
    fn the_reset_control_lies_between_the_bytes_of_the_address() {
        let ports = ports();
        ports.write(0, &0x8000_0004_u32.to_le_bytes());
        ports.write(1, &[0x0e]);
        assert_eq!(read(&ports, 1), [0x0e]);
        assert_eq!(read(&ports, 0), 0x8000_0004_u32.to_le_bytes());
        assert_eq!(read(&ports, 0), [0xff], "bytes of the address are nobody's");
        ports.write(0, &[0, 0]);
        assert_eq!(read(&ports, 0), 0x8000_0004_u32.to_le_bytes());
    }

    #[test]
    fn every_function_has_a_page_of_its_bus() {
        let ecam = Ecam::new(ports().topology);
        assert_eq!(read(&ecam, 0), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&ecam, 0x100), [0; 4], "no extended capabilities");
        assert_eq!(read(&ecam, 0x1000), [0xff; 4]);
        assert_eq!(read(&ecam, 0xffe), [0xff; 4], "an access to two functions");
        assert_eq!(ecam_target(0x12_f458, 4), Some((1, 0x2f, 0x458)));
        assert_eq!(ecam_target(0x1000_0000, 4), None);
    }

    #[test]
    fn the_address_moves_with_the_guest() {
        let from = ports();
        from.write(0, &0x8000_0004_u32.to_le_bytes());
        assert_round_trip(&from, &ports());
        let bridge = HostBridge::new();
        let _ = bridge.write_config(COMMAND, &[0xff, 0xff]);
        assert_round_trip(&bridge, &HostBridge::new());
    }
}
