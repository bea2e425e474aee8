//! `uvmm`, the command.
use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main(|_config| Err("this build has no machine to run a guest on".into()))
}
