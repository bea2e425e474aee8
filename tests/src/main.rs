//! `cargo lab`: a host with KVM, VFIO and SR-IOV on any machine, and what runs in it.
use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tests::artefacts::Artefacts;
use tests::host::{Lab, Nesting, agent};

/// A lab host for uvmm: an emulated machine with KVM, an IOMMU and SR-IOV NICs, on any machine.
#[derive(Parser)]
#[command(bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs CMD in the lab host as root; streams, signals and exit status pass through.
    Exec {
        /// The program and its arguments.
        #[arg(
            required = true,
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "CMD"
        )]
        command: Vec<OsString>,
    },
    /// Opens a shell in the lab host.
    Shell,
    /// Serves commands inside the lab host; run by the lab itself.
    #[command(hide = true)]
    Agent,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Exec { command } => exec(&command, false),
        Command::Shell => {
            eprintln!("lab: the lab host runs by {}; its shell is root's", Nesting::here());
            exec(&["bash".into(), "-i".into()], true)
        }
        Command::Agent => Ok(agent::serve().map(|()| 0)?),
    }
}

fn exec(command: &[OsString], terminal: bool) -> anyhow::Result<u8> {
    let artefacts = Artefacts::prepare().context("the lab cannot be prepared")?;
    let status = Lab::boot(&artefacts)?.exec(command, terminal)?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}
