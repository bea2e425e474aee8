//! The guest side of uvmm.
