//! `uvmm`, the command.
use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main(|config| {
        use vmm::cli::Ended;
        use vmm::session::Ending;
        Ok(match vmm::session::run(config)? {
            Ending::Off | Ending::Quit => Ended::Off,
            Ending::Migrated => Ended::MovedAway,
            Ending::Died(w) => Ended::Died(w),
            Ending::Signal(s) => Ended::Signal(s),
        })
    })
}
