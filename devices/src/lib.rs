//! Devices: registers, guest memory and interrupts-as-traits.
