//! What a guest depends on of processors: compared before anything moves.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kvm_bindings::CpuId;
use kvm_ioctls::Cap;
use migration::compat::{Item, Profile, Rule, Terms, Value};

use super::count;
use super::extended::{self, Part};
use super::feature::{Features, WORDS};
use super::promise::{self, Promises};
use super::vcpu::{self, Seen};
use super::{cpuid, msr};
use crate::kvm::{Error, Vm};

/// The path of the TSC's frequency in a profile.
pub(crate) const TSC_KHZ: &str = "cpu/tsc-khz";
const VENDOR: &str = "cpu/vendor";
const FEATURES: &str = "cpu/features/";
const EXTENDED: &str = "cpu/xsave";
const XSAVE_BYTES: &str = "cpu/xsave-bytes";
const MSRS: &str = "cpu/msrs";
const ADDRESS_BITS: &str = "cpu/address-bits";
const PCI_MEMORY: &str = "pci/memory-64";

/// What there is of processors and around them: what a guest knows, or what a host could show.
#[derive(Debug, Clone)]
pub(crate) struct Platform {
    cpuid: CpuId,
    /// Bytes of extended state.
    xsave_bytes: usize,
    tsc_khz: u64,
    /// Model-specific registers: those that a guest uses, or that a host has.
    msrs: BTreeSet<u64>,
    /// What such registers tell of the processor.
    promises: Promises,
    /// Where 64-bit base address registers can be.
    pci_memory: Option<Range<u64>>,
}

impl Platform {
    /// What the guest in `vm` depends on, whose `msrs` have these values.
    pub(crate) fn of_guest(vm: &Vm, seen: &Seen, msrs: &BTreeMap<u32, u64>) -> Self {
        Self::known(seen, msrs, pci_memory(vm, seen))
    }

    /// The same of a guest whose base address registers can be there.
    pub(super) fn known(
        seen: &Seen,
        msrs: &BTreeMap<u32, u64>,
        pci_memory: Option<Range<u64>>,
    ) -> Self {
        // A register that a host lacks reads as zero.
        let used = msrs.iter().filter(|&(_, &value)| value != 0);
        Self {
            cpuid: seen.cpuid.clone(),
            xsave_bytes: vcpu::guest_xsave_bytes(&seen.cpuid),
            tsc_khz: seen.tsc_khz.into(),
            msrs: used.map(|(&index, _)| index.into()).collect(),
            promises: Promises::of_guest(msrs),
            pci_memory,
        }
    }

    /// What a host that can show `host` could give to a guest in `vm`, whose vCPUs were made as they
    /// were `built`.
    ///
    /// If the guest knows a TSC of `guest_tsc_khz`, the host has that very frequency if it is its
    /// own, as far as KVM tells them apart, or if it can scale to it.
    pub(crate) fn of_host(
        vm: &Vm,
        host: &Seen,
        built: &Seen,
        guest_tsc_khz: Option<u64>,
    ) -> Result<Self, Error> {
        let own = u64::from(host.tsc_khz);
        let scales = vm.kvm().check_extension(Cap::TscControl);
        Ok(Self {
            cpuid: host.cpuid.clone(),
            xsave_bytes: vcpu::xsave_bytes(vm.kvm()),
            tsc_khz: tsc_khz(own, scales, guest_tsc_khz),
            msrs: msr::of_state(vm.kvm())?.into_iter().map(u64::from).collect(),
            promises: Promises::of_host(vm.kvm())?,
            pci_memory: pci_memory(vm, built),
        })
    }

    /// What a guest wants of a host: the same without what fits any.
    ///
    /// A build that does not know of a thing takes a guest that has nothing of it.
    pub(crate) fn wanted(&self) -> Profile {
        let fits_any = |item: &&Item| match (item.rule, &item.value) {
            (Rule::Subset, Value::Bits(words)) => words.iter().all(|word| *word == 0),
            (Rule::Subset, Value::Numbers(numbers)) => numbers.is_empty(),
            (Rule::AtLeast, Value::Number(number)) => *number == 0,
            _ => false,
        };
        let profile = self.profile();
        let wanted = profile.items().iter().filter(|item| !fits_any(item));
        wanted.cloned().fold(Profile::new(), Profile::with_item)
    }

    /// The same as items to compare.
    pub(crate) fn profile(&self) -> Profile {
        let Self { cpuid, xsave_bytes, tsc_khz, msrs, promises, pci_memory } = self;
        let pci_memory = pci_memory
            .as_ref()
            .map_or("none".to_owned(), |range| format!("{:#x}..{:#x}", range.start, range.end));
        let extended: BTreeSet<_> = extended::parts(cpuid).into_iter().map(Part::code).collect();
        let profile = Profile::new()
            .with("cpu/architecture", Rule::Eq, "x86-64")
            .with(VENDOR, Rule::Eq, vendor(cpuid))
            .with(ADDRESS_BITS, Rule::AtLeast, u64::from(cpuid::address_bits(cpuid)))
            .with(EXTENDED, Rule::Subset, extended)
            .with(XSAVE_BYTES, Rule::AtLeast, *xsave_bytes as u64)
            .with(TSC_KHZ, Rule::Eq, *tsc_khz)
            .with(MSRS, Rule::Subset, msrs.clone())
            .with(PCI_MEMORY, Rule::Eq, pci_memory);
        let profile = count::add_to(promises.add_to(profile), cpuid);
        Features::of(cpuid).lasting().words().fold(profile, |profile, (word, bits)| {
            profile.with(format!("{FEATURES}{word}"), Rule::Subset, vec![u64::from(bits)])
        })
    }
}

/// Whether what is at `path` depends on the machine, and not on its host alone.
pub(crate) fn is_of_machine(path: &str) -> bool {
    path == PCI_MEMORY
}

fn pci_memory(vm: &Vm, seen: &Seen) -> Option<Range<u64>> {
    vm.pci_memory_64(cpuid::address_bits(&seen.cpuid))
}

/// The frequency that a host whose `own` is this gives to a guest.
fn tsc_khz(own: u64, scales: bool, guest: Option<u64>) -> u64 {
    guest.filter(|&khz| scales || vcpu::is_same_tsc(own, khz)).unwrap_or(own)
}

fn vendor(cpuid: &CpuId) -> String {
    let leaf = cpuid::leaf(cpuid, 0, 0).unwrap_or_default();
    let text: Vec<u8> =
        [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    String::from_utf8_lossy(&text).into_owned()
}

/// The names of processors' features, and what helps where hosts differ.
pub(crate) struct ProcessorTerms;

impl Terms for ProcessorTerms {
    fn member(&self, path: &str, member: u64) -> Option<String> {
        match path {
            EXTENDED => Some(Part::describe(member)),
            MSRS => Some(format!("{member:#x}")),
            _ if promise::is_at(path) => promise::name(path, member),
            _ if count::is_at(path) => Some(count::name(path, member)),
            _ => {
                let word = path.strip_prefix(FEATURES)?;
                let word = WORDS.iter().find(|known| known.name() == word)?;
                Some(word.feature(member))
            }
        }
    }

    fn remedy(&self, path: &str) -> Option<String> {
        Some(
            match path {
                VENDOR => "choose a host with processors of the same maker",
                TSC_KHZ => {
                    "this host cannot scale: choose one that can ('uvmm doctor' tells) or that \
                     has this frequency"
                }
                MSRS => {
                    "use a kernel as new as the source's, or choose a host with processors more \
                     like the source's"
                }
                EXTENDED | XSAVE_BYTES => {
                    "choose a host with processors more like the source's, or start the guest \
                     with a --cpu that leaves these features out"
                }
                ADDRESS_BITS | PCI_MEMORY => {
                    "choose a host whose processors have as many address bits, or start the \
                     guest with a level as --cpu, which has the same everywhere"
                }
                _ if promise::is_at(path) => {
                    "the guest relies on it: choose a host whose processors and kernel tell the \
                     same, or start the guest with a level as --cpu, which leaves this out"
                }
                _ if count::is_at(path) || path.starts_with(FEATURES) => {
                    "choose a host that has what is wanted, or start the guest with a --cpu that \
                     all hosts can give ('uvmm doctor' tells)"
                }
                _ => return None,
            }
            .to_owned(),
        )
    }
}

#[cfg(test)]
mod tests;
