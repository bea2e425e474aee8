//! Message-signalled interrupts with a table (PCI 3.0, 6.8.2).
//!
//! [`Capability`] is what lies in configuration space, [`Msix`] the table and the pending bits that
//! it points at. A device that is emulated asks [`Msix::fire`] what to send; for one that is
//! assigned, every write answers which vectors may have changed, and [`Msix::message`] says into
//! what.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::registers::Registers;
use crate::irq::Message;

/// How many bytes the capability takes.
pub const CAPABILITY_LENGTH: u16 = 12;
/// How many vectors a table may have.
pub const VECTORS_MAX: u16 = 2048;
/// Bytes of an entry of the table.
pub const ENTRY: u64 = 16;

const CONTROL: u16 = 2;
const TABLE: u16 = 4;
const PBA: u16 = 8;

const SIZE: u16 = 0x7ff;
const MASK_ALL: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;
/// The one bit of an entry's vector control that is defined.
const MASKED: u32 = 1;

/// Where the table or the pending bits lie: the base address register, and the bytes from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which base address register, 0 to 5.
    pub bar: u8,
    /// A multiple of 8.
    pub offset: u32,
}

impl Place {
    fn of(register: u32) -> Self {
        let [low, ..] = register.to_le_bytes();
        Self { bar: low & 7, offset: register & !7 }
    }

    fn register(self) -> u32 {
        self.offset & !7 | u32::from(self.bar & 7)
    }
}

/// The MSI-X capability: where it lies and what it points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Where it lies in configuration space.
    pub offset: u16,
    /// How many vectors the table has, 1 to [`VECTORS_MAX`].
    pub vectors: u16,
    /// Where the table lies.
    pub table: Place,
    /// Where the pending bits lie.
    pub pending: Place,
}

impl Capability {
    /// The one that a device has at `offset`: its message control and the two registers after it.
    #[must_use]
    pub fn of_device(offset: u16, control: u16, table: u32, pending: u32) -> Self {
        let vectors = (control & SIZE) + 1;
        Self { offset, vectors, table: Place::of(table), pending: Place::of(pending) }
    }

    /// Defines its registers, but not its identifier and link.
    pub fn define(&self, registers: &mut Registers) {
        let size = self.vectors.clamp(1, VECTORS_MAX) - 1;
        registers.writable(self.offset + CONTROL, size, ENABLE | MASK_ALL);
        registers.constant(self.offset + TABLE, self.table.register());
        registers.constant(self.offset + PBA, self.pending.register());
    }

    /// Where it lies in configuration space.
    #[must_use]
    pub fn range(&self) -> Range<u16> {
        self.offset..self.offset + CAPABILITY_LENGTH
    }

    /// What the guest wrote: whether it is enabled, and whether all of it is masked.
    #[must_use]
    pub fn control(&self, registers: &Registers) -> Control {
        let control: u16 = registers.get(self.offset + CONTROL);
        Control { enabled: control & ENABLE != 0, masked: control & MASK_ALL != 0 }
    }
}

/// What the message control register says of all vectors at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// The guest uses MSI-X, so that INTx and MSI must be quiet.
    pub enabled: bool,
    /// All vectors are masked, whatever their entries say.
    pub masked: bool,
}

/// An entry of the table (6.8.2.6 to 6.8.2.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    fn to_bytes(self) -> [u8; 16] {
        let all =
            u128::from(self.address) | u128::from(self.data) << 64 | u128::from(self.control) << 96;
        all.to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, c0, c1, c2, c3] = bytes;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
            control: u32::from_le_bytes([c0, c1, c2, c3]) & MASKED,
        }
    }
}

/// The table and the pending bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Msix {
    control: Control,
    entries: Vec<Entry>,
    pending: Vec<u64>,
}

impl Msix {
    /// A table of `vectors` entries, 1 to [`VECTORS_MAX`], all masked as after power-on.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let vectors = usize::from(vectors.clamp(1, VECTORS_MAX));
        let entry = Entry { address: 0, data: 0, control: MASKED };
        let control = Control::default();
        Self { control, entries: vec![entry; vectors], pending: vec![0; vectors.div_ceil(64)] }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).expect("at most VECTORS_MAX")
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_size(&self) -> u64 {
        ENTRY * u64::from(self.vectors())
    }

    /// Bytes of the pending bits.
    #[must_use]
    pub fn pending_size(&self) -> u64 {
        8 * self.pending.len() as u64
    }

    /// Becomes what it was after power-on.
    pub fn reset(&mut self) {
        *self = Self::new(self.vectors());
    }

    /// Reads the table from `offset` on; zeros past its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let entry = usize::try_from(at / ENTRY).ok().and_then(|index| self.entries.get(index));
            let Some(entry) = entry else { return };
            *byte = entry.to_bytes()[byte_of_entry(at)];
        }
    }

    /// Writes the table from `offset` on; gives the vectors whose entries were written.
    ///
    /// Send what [`Msix::take_pending`] gives then.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Range<u16> {
        let mut written = 0..0;
        for (byte, at) in data.iter().zip(offset..=u64::MAX) {
            let Ok(vector) = u16::try_from(at / ENTRY) else { break };
            let Some(entry) = self.entries.get_mut(usize::from(vector)) else { break };
            let mut bytes = entry.to_bytes();
            bytes[byte_of_entry(at)] = *byte;
            *entry = Entry::from_bytes(bytes);
            let start = if written.is_empty() { vector } else { written.start };
            written = start..vector + 1;
        }
        written
    }

    /// Reads the pending bits from `offset` on; zeros past their end.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let word = usize::try_from(at / 8).ok().and_then(|index| self.pending.get(index));
            let Some(word) = word else { return };
            *byte = word.to_le_bytes()[usize::try_from(at % 8).expect("below 8")];
        }
    }

    /// What message control says now.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control
    }

    /// Follows message control; gives the vectors that may have changed: none or all.
    ///
    /// Send what [`Msix::take_pending`] gives then.
    pub fn set_control(&mut self, control: Control) -> Range<u16> {
        if !control.enabled {
            // Nothing waits for an interrupt that is switched off.
            self.pending.fill(0);
        }
        let changed = std::mem::replace(&mut self.control, control) != control;
        if changed { 0..self.vectors() } else { 0..0 }
    }

    /// What `vector` becomes: `None` while it is masked, switched off or not there.
    #[must_use]
    pub fn message(&self, vector: u16) -> Option<Message> {
        let Entry { address, data, control } = *self.entries.get(usize::from(vector))?;
        let open = self.control.enabled && !self.control.masked && control & MASKED == 0;
        open.then_some(Message { address, data })
    }

    /// Interrupts by `vector`: what to send, or `None` and it is pending if it is masked.
    pub fn fire(&mut self, vector: u16) -> Option<Message> {
        let message = self.message(vector);
        if message.is_none() && self.control.enabled {
            self.set_pending(vector, true);
        }
        message
    }

    /// Says whether an interrupt by `vector` waits, for a device that keeps it back itself.
    pub fn set_pending(&mut self, vector: u16, pending: bool) {
        if vector < self.vectors() {
            let (word, bit) = (usize::from(vector / 64), vector % 64);
            self.pending[word] = self.pending[word] & !(1 << bit) | u64::from(pending) << bit;
        }
    }

    /// What waited for its mask to be taken away, each with its vector; to be sent.
    pub fn take_pending(&mut self) -> Vec<(u16, Message)> {
        if self.pending.iter().all(|word| *word == 0) {
            return Vec::new();
        }
        let waits = |vector: &u16| self.pending[usize::from(vector / 64)] >> (vector % 64) & 1 != 0;
        let waiting = (0..self.vectors()).filter(waits);
        let ready = waiting.filter_map(|vector| Some((vector, self.message(vector)?)));
        let ready: Vec<_> = ready.collect();
        for (vector, _) in &ready {
            self.set_pending(*vector, false);
        }
        ready
    }

    /// What moves with the guest.
    #[must_use]
    pub fn save(&self) -> MsixV1 {
        let Self { control, entries, pending } = self.clone();
        MsixV1 { control, entries, pending }
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// Says why `saved` is not the state of such a table; nothing is changed then.
    pub fn load(&mut self, saved: MsixV1) -> Result<(), &'static str> {
        let MsixV1 { control, entries, pending } = saved;
        if entries.len() != self.entries.len() || pending.len() != self.pending.len() {
            return Err("the interrupt table has another size");
        }
        if entries.iter().any(|entry| entry.control & !MASKED != 0) {
            return Err("reserved bits of an interrupt's vector control are set");
        }
        let past = entries.len() % 64;
        if past != 0 && pending.last().is_some_and(|word| word >> past != 0) {
            return Err("an interrupt is pending that is not there");
        }
        *self = Self { control, entries, pending };
        Ok(())
    }
}

fn byte_of_entry(at: u64) -> usize {
    usize::try_from(at % ENTRY).expect("below 16")
}

/// The saved form of [`Msix`], for a device to put into its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixV1 {
    control: Control,
    entries: Vec<Entry>,
    pending: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::registers::CONVENTIONAL;
    use super::*;

    const ON: Control = Control { enabled: true, masked: false };

    fn program(msix: &mut Msix, vector: u64, control: u32) {
        let mut entry = 0xfee0_2000_u64.to_le_bytes().to_vec();
        entry.extend(0x55_u32.to_le_bytes());
        entry.extend(control.to_le_bytes());
        msix.write_table(vector * ENTRY, &entry);
    }

    #[test]
    fn an_interrupt_is_sent_once_its_entry_is_unmasked_and_msix_enabled() {
        let mut msix = Msix::new(3);
        program(&mut msix, 1, 0);
        assert_eq!(msix.fire(1), None, "MSI-X is not enabled");
        assert_eq!(msix.set_control(ON), 0..3);
        assert_eq!(msix.take_pending(), [], "nothing waits for what was switched off");
        assert_eq!(msix.fire(1), Some(Message { address: 0xfee0_2000, data: 0x55 }));
        assert_eq!(msix.fire(0), None, "entries are masked after power-on");
        assert_eq!(msix.fire(3), None);
    }

    #[test]
    fn masked_interrupts_are_pending_until_they_are_unmasked() {
        let mut msix = Msix::new(70);
        msix.set_control(Control { enabled: true, masked: true });
        program(&mut msix, 66, 0);
        assert_eq!(msix.fire(66), None);
        assert_eq!(msix.fire(2), None);
        let mut bits = [0; 16];
        msix.read_pending(0, &mut bits);
        assert_eq!((bits[0], bits[8]), (4, 4));
        msix.set_control(ON);
        let sent = msix.take_pending();
        assert_eq!(sent, [(66, Message { address: 0xfee0_2000, data: 0x55 })]);
        program(&mut msix, 2, 0);
        assert_eq!(msix.take_pending().len(), 1);
        assert_eq!(msix.take_pending(), []);
    }

    #[test]
    fn a_write_tells_which_vectors_it_touched() {
        let mut msix = Msix::new(4);
        assert_eq!(msix.write_table(12, &[1; 4]), 0..1);
        assert_eq!(msix.write_table(0x1c, &[0; 8]), 1..3);
        assert_eq!(msix.write_table(0x3c, &[0; 8]), 3..4);
        assert_eq!(msix.write_table(0x40, &[0; 8]), 0..0);
        assert_eq!(msix.write_table(u64::MAX, &[0; 8]), 0..0);
        assert_eq!(msix.set_control(Control::default()), 0..0);
    }

    #[test]
    fn the_capability_reads_back_what_it_points_at() {
        let mut registers = Registers::new(CONVENTIONAL);
        let capability = Capability {
            offset: 0x70,
            vectors: 3,
            table: Place { bar: 3, offset: 0 },
            pending: Place { bar: 3, offset: 0x2000 },
        };
        capability.define(&mut registers);
        registers.write(0x70, &[0xff; 12]);
        let read = (registers.get(0x72), registers.get(0x74), registers.get(0x78));
        assert_eq!(Capability::of_device(0x70, read.0, read.1, read.2), capability);
        let control = capability.control(&registers);
        assert_eq!(control, Control { enabled: true, masked: true });
    }

    proptest! {
        #[test]
        fn any_guest_is_withstood(
            vectors in 1u16..130,
            writes in prop::collection::vec((0u64..2100, prop::collection::vec(any::<u8>(), 0..17)), 0..32),
            fires in prop::collection::vec(any::<u16>(), 0..32),
        ) {
            let mut msix = Msix::new(vectors);
            msix.set_control(ON);
            for (offset, data) in &writes {
                let touched = msix.write_table(*offset, data);
                prop_assert!(touched.end <= vectors);
                msix.read_table(*offset, &mut vec![0; data.len()]);
                msix.read_pending(*offset, &mut vec![0; data.len()]);
            }
            for vector in fires {
                msix.fire(vector);
            }
            msix.take_pending();
            let mut twin = Msix::new(vectors);
            twin.load(msix.save()).unwrap();
            prop_assert_eq!(&twin, &msix);
            prop_assert!(Msix::new(vectors + 1).load(msix.save()).is_err());
        }
    }
}
