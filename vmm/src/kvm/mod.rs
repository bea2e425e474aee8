//! KVM: the virtual machine, and why the kernel refused.

mod dirty_log;
pub(crate) mod exact;
mod harvest;
mod irq;
mod ring;
mod routes;
mod slots;
pub(crate) mod tsc;
mod vm;

pub(crate) use irq::IrqLine;
pub(crate) use routes::Routes;
pub(crate) use slots::Slots;
pub(crate) use vm::Vm;

/// What KVM refused, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// `/dev/kvm` cannot be used.
    #[error("cannot open /dev/kvm{}", remedy(.0))]
    Open(#[source] kvm_ioctls::Error),
    /// The kernel lacks something that uvmm cannot do without.
    #[error("this host's KVM lacks {0}: a newer kernel is needed")]
    Lacks(&'static str),
    /// The kernel has no dirty rings.
    #[error(
        "this host's KVM has no dirty rings: leave out --dirty-tracking ring, or choose another \
         host ('uvmm doctor' tells what there is)"
    )]
    NoDirtyRing,
    /// A vCPU's dirty ring cannot be mapped.
    #[error("cannot map the dirty ring of a vCPU")]
    DirtyRing(#[source] std::io::Error),
    /// KVM does not do what it says of dirty rings.
    #[error(
        "{taken} entries of the dirty rings were to be reset and {reset} were: start the VM with \
         --dirty-tracking log"
    )]
    DirtyRingsStuck {
        /// How many entries were given back.
        taken: usize,
        /// How many of them KVM took.
        reset: usize,
    },
    /// An ioctl failed.
    #[error("{name}")]
    Ioctl {
        /// The ioctl's name in the kernel's documentation.
        name: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More CPUID entries than KVM takes.
    #[error("{0} CPUID entries are more than KVM takes")]
    TooManyCpuidEntries(usize),
    /// Processors that this host cannot give.
    #[error(
        "this host cannot give a guest the processors {model}, as it lacks {lacking}: choose \
         another --cpu ('uvmm doctor' tells what there is) or another host"
    )]
    CpuLacks {
        /// What was asked for.
        model: String,
        /// The features that are not there, by name.
        lacking: String,
    },
    /// Processors that nobody could make.
    #[error("{feature} is nothing without {needed}: add both to the processors or none")]
    CpuNeeds {
        /// What was asked for.
        feature: String,
        /// What was not.
        needed: &'static str,
    },
    /// More RAM than the guest's processors can address.
    #[error(
        "guest memory ends at {end:#x}, which processors with {bits} address bits do not reach: \
         ask for less, or for --cpu host"
    )]
    AddressBits {
        /// The address after the last byte of RAM.
        end: u64,
        /// Bits of a physical address.
        bits: u8,
    },
    /// More model-specific registers than KVM takes at once.
    #[error("{0} model-specific registers are more than KVM takes at once")]
    TooManyMsrs(usize),
    /// A model-specific register with a value that this host cannot hold.
    #[error("this host's KVM refuses {value:#x} in model-specific register {index:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// The value that it should have had.
        value: u64,
    },
    /// An extended processor state of a size that this host does not use.
    #[error("the extended processor state has {found} bytes, this host's KVM has room for {want}")]
    XsaveSize {
        /// Bytes that this host's KVM uses.
        want: usize,
        /// Bytes that the saved state has.
        found: usize,
    },
    /// A TSC frequency that this host can neither run at nor scale to.
    #[error("the guest's TSC runs at {wanted} kHz, this host's at {here} kHz and it cannot scale")]
    TscFrequency {
        /// The host's frequency.
        here: u32,
        /// The guest's frequency.
        wanted: u32,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl Error {
    /// The error of the ioctl `name`, for `map_err`.
    pub(crate) fn ioctl(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { name, source }
    }

    /// The error of the ioctl `name`, which has just failed.
    pub(crate) fn last(name: &'static str) -> Self {
        Self::Ioctl { name, source: kvm_ioctls::Error::last() }
    }
}

fn remedy(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            " (is virtualisation on in the firmware, and kvm_intel or kvm_amd loaded?)"
        }
        libc::EACCES | libc::EPERM => " (add the user to the group that owns it: usually kvm)",
        _ => "",
    }
}
