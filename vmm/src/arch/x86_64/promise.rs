//! Registers in which a processor tells its guest what it is like: KVM takes from its user what no
//! processor of the host would say, so that is compared before anything moves.

use std::collections::BTreeMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use migration::compat::{Profile, Rule};

use crate::kvm::Error;

/// A register of promises, and how to compare them.
struct Register {
    index: u32,
    path: &'static str,
    /// Names of the bits, from 0 on; `-` for one without.
    names: &'static str,
    /// Bits that admit a weakness: what they promise is that they are not set.
    admits: u64,
    /// Numbers within it, by their lowest bit and their width: they fit where they are the same.
    numbers: &'static [(u32, u32)],
}

/// SDM vol. 4, table 2-2 and 2-3; AMD PPR, `DE_CFG`; names as in Linux's msr-index.h.
const REGISTERS: [Register; 3] = [
    Register {
        index: super::msr::ARCH_CAPABILITIES,
        path: "cpu/arch-capabilities",
        names: "rdcl_no ibrs_all no_rsba skip_vmentry_l1dflush ssb_no mds_no pschange_mc_no \
                tsx_ctrl taa_no mcu_control misc_package_ctls energy_filtering doitm \
                sbdr_ssdp_no fbsdp_no psdp_no - fb_clear fb_clear_ctrl no_rrsba bhi_no \
                xapic_disable - overclocking pbrsb_no gds_ctrl gds_no rfds_no rfds_clear",
        // RSBA and RRSBA: returns may be predicted from elsewhere.
        admits: 1 << 2 | 1 << 19,
        numbers: &[],
    },
    Register {
        index: super::msr::PERF_CAPABILITIES,
        path: "cpu/perf-capabilities",
        names: "- - - - - - pebs_trap pebs_arch_reg - - - - smm_freeze full_width_write \
                pebs_baseline perf_metrics pebs_output_pt",
        admits: 0,
        // The formats of LBR and of PEBS records.
        numbers: &[(0, 6), (8, 4)],
    },
    Register {
        index: 0xc001_1029,
        path: "cpu/de-cfg",
        names: "- lfence_serialize",
        admits: 0,
        numbers: &[],
    },
];

impl Register {
    /// What a processor promises that has `value` in it: a set of bits, of which fewer are less.
    ///
    /// Each number has a word of its own in which it is the number of the only bit; 0 is none.
    fn promised(&self, value: u64) -> Vec<u64> {
        let field = |&(lowest, width): &(u32, u32)| value >> lowest & ((1 << width) - 1);
        let masks = self.numbers.iter().map(|(lowest, width)| ((1 << width) - 1) << lowest);
        let flags = (value ^ self.admits) & !masks.fold(0, |all, mask: u64| all | mask);
        let numbers = self.numbers.iter().map(|at| 1 << field(at) & !1);
        std::iter::once(flags).chain(numbers).collect()
    }

    /// What people call such a bit.
    fn name(&self, bit: u64) -> String {
        let (word, bit) = (usize::try_from(bit / 64).unwrap_or(usize::MAX), bit % 64);
        let name = match word.checked_sub(1) {
            None => self.names.split_ascii_whitespace().nth(usize::try_from(bit).unwrap_or(64)),
            Some(at) => {
                let lowest = self.numbers.get(at).map_or(0, |(lowest, _)| *lowest);
                return format!("format {bit} at bit {lowest} of register {:#x}", self.index);
            }
        };
        let unnamed = || format!("bit {bit} of register {:#x}", self.index);
        name.filter(|name| *name != "-").map_or_else(unnamed, str::to_owned)
    }
}

/// What processors say in such registers, by their indices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Promises(BTreeMap<u32, u64>);

impl Promises {
    /// Those among the registers of a guest.
    pub(crate) fn of_guest(msrs: &BTreeMap<u32, u64>) -> Self {
        let kept = REGISTERS.iter().filter_map(|register| msrs.get_key_value(&register.index));
        Self(kept.map(|(&index, &value)| (index, value)).collect())
    }

    /// The most that this host's processors and its KVM can keep.
    pub(crate) fn of_host(kvm: &Kvm) -> Result<Self, Error> {
        let read = |register: &Register| {
            let entry = kvm_msr_entry { index: register.index, ..Default::default() };
            let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::TooManyMsrs(1))?;
            let read = kvm.get_msrs(&mut msrs).map_err(Error::ioctl("KVM_GET_MSRS"))?;
            // One that it does not know promises nothing.
            let value = msrs.as_slice().first().filter(|_| read == 1).map_or(0, |msr| msr.data);
            Ok((register.index, value))
        };
        REGISTERS.iter().map(read).collect::<Result<_, Error>>().map(Self)
    }

    /// Adds them to what is compared.
    pub(crate) fn add_to(&self, profile: Profile) -> Profile {
        REGISTERS.iter().fold(profile, |profile, register| match self.0.get(&register.index) {
            Some(&value) => profile.with(register.path, Rule::Subset, register.promised(value)),
            None => profile,
        })
    }
}

/// Whether a profile tells of promises at `path`.
pub(crate) fn is_at(path: &str) -> bool {
    REGISTERS.iter().any(|register| register.path == path)
}

/// What people call the promise `bit` at `path`.
pub(crate) fn name(path: &str, bit: u64) -> Option<String> {
    let register = REGISTERS.iter().find(|register| register.path == path)?;
    Some(register.name(bit))
}

#[cfg(test)]
mod tests {
    use migration::compat::agree;

    use super::*;

    const ARCH: u32 = 0x10a;
    const PERF: u32 = 0x345;

    fn lacking(index: u32, guest: u64, host: u64) -> Vec<String> {
        let [wanted, found] = [guest, host].map(|value| {
            Promises::of_guest(&BTreeMap::from([(0x10, 77), (index, value)])).add_to(Profile::new())
        });
        let mismatches = agree(&wanted, &found).err().unwrap_or_default();
        assert!(mismatches.iter().all(|mismatch| is_at(&mismatch.path)), "{mismatches:?}");
        let register = REGISTERS.iter().find(|register| register.index == index).unwrap();
        let (wanted, found) = (register.promised(guest), register.promised(host));
        let words = wanted.iter().zip(&found).map(|(wanted, found)| wanted & !found);
        let bits = (0..).zip(words).flat_map(|(at, word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at * 64 + bit)
        });
        let names: Vec<_> = bits.filter_map(|bit| name(register.path, bit)).collect();
        assert_eq!(names.is_empty(), mismatches.is_empty());
        names
    }

    #[test]
    fn a_guest_that_was_told_it_is_safe_goes_nowhere_else() {
        assert_eq!(lacking(ARCH, 1 | 1 << 5 | 1 << 8, 1 << 5), ["rdcl_no", "taa_no"]);
        assert_eq!(lacking(ARCH, 1 << 62, 0), ["bit 62 of register 0x10a"]);
        assert_eq!(lacking(ARCH, 1, 1 | 1 << 5 | 1 << 26), <[&str; 0]>::default());
    }

    #[test]
    fn a_weakness_that_a_guest_does_not_know_of_is_none_that_it_may_get() {
        assert_eq!(lacking(ARCH, 0, 1 << 2 | 1 << 19), ["no_rsba", "no_rrsba"]);
        assert!(lacking(ARCH, 1 << 2, 0).is_empty(), "it guards against what is not there");
    }

    #[test]
    fn formats_fit_where_they_are_the_same_or_not_used() {
        assert!(lacking(PERF, 0x32_05, 0x33_05).len() == 1);
        assert!(lacking(PERF, 0x2005, 0x3305).is_empty());
        assert_eq!(lacking(PERF, 5, 7), ["format 5 at bit 0 of register 0x345"]);
        assert_eq!(lacking(PERF, 1 << 13, 0), ["full_width_write"]);
        assert_eq!(lacking(0xc001_1029, 2, 0), ["lfence_serialize"]);
    }

    #[test]
    fn a_processor_without_such_registers_promises_nothing() {
        let none = Promises::of_guest(&BTreeMap::from([(0x10, 77)])).add_to(Profile::new());
        assert_eq!(none, Profile::new());
    }

    #[test]
    fn names_belong_to_their_bits() {
        let arch = "cpu/arch-capabilities";
        for (bit, wanted) in [(0, "rdcl_no"), (8, "taa_no"), (17, "fb_clear"), (24, "pbrsb_no")] {
            assert_eq!(name(arch, bit).unwrap(), wanted);
        }
        assert_eq!(name(arch, 28).unwrap(), "rfds_clear");
        assert_eq!(name(arch, 16).unwrap(), "bit 16 of register 0x10a");
        assert_eq!(name("cpu/vendor", 0), None);
    }
}
