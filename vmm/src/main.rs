//! `uvmm`, the command.
fn main() {}
