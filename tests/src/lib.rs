//! The lab, and the tests that drive uvmm from outside.
pub mod artefacts;
pub mod bench;
pub mod cache;
pub mod cpio;
pub mod demo;
pub mod error;
pub mod guest_driver;
pub mod host;
pub mod initramfs;
pub mod install;
pub mod kernel;
pub mod network;
pub mod program;
pub mod suite;
pub mod tier;
pub mod vm;
