//! What differs between processor architectures, under the same names for each.
//!
//! The only place in the project that asks for the target architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("uvmm runs on x86-64 hosts; another architecture is a sibling of arch/x86_64");
