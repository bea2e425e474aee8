//! The guest side of uvmm.

/// The built-in guest: a kernel of our own that fills, rewrites and verifies its memory on command.
///
/// An x86-64 ELF with a PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`), so it boots like any other such
/// kernel. It talks on COM1; `help` there lists the commands. Commands after `run=` on the kernel
/// command line, separated by semicolons, are run at start.
pub const TINY_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny-guest"));
