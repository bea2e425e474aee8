//! What was typed, and doing it.

mod duration;
mod file;
mod migrate;
mod plug;
mod resolve;
mod run;
mod snapshot;
mod vms;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::cause;
use crate::config::{HostDevice, VmName};
use crate::control::{Client, Request, RuntimeDir};
use crate::doctor;
use crate::session::{self, Ending};

const EXIT_STATUS: &str = "\
Exit status:
  0    it was done; for run: the guest powered off, was stopped, or has moved away
  1    it was not done, and one line on standard error says why
  2    the command line is wrong
  3    for run: the guest died (triple fault or an error of KVM)
  128+N  for run: signal N ended the VM

Running VMs are found in $UVMM_RUNTIME_DIR, else $XDG_RUNTIME_DIR/uvmm, else /run/uvmm for root
and /tmp/uvmm-UID for others. What must outlive a VM that was given away is in $UVMM_STATE_DIR,
else /var/lib/uvmm for root, and $XDG_STATE_HOME/uvmm or ~/.local/state/uvmm for others.";

/// Runs Linux guests in small virtual machines and moves them between hosts while they run.
#[derive(Debug, Parser)]
#[command(name = "uvmm", version, after_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a VM until its guest powers off.
    Run(Box<run::RunArgs>),
    /// Move a guest to the host that waits for it with `uvmm run --incoming`.
    Migrate(migrate::MigrateArgs),
    /// Write a guest to a file, from which `uvmm run --restore` makes copies of it.
    Snapshot(snapshot::SnapshotArgs),
    /// Give up the migration or snapshot that is under way; the guest goes on here.
    Cancel(Vm),
    /// Show or decide a migration whose outcome is not known.
    Resolve(resolve::ResolveArgs),
    /// Give a running guest a device, and wait until it uses it.
    Plug(plug::PlugArgs),
    /// Take a device from a running guest once it let go of it, and give it back to the host.
    Unplug(plug::UnplugArgs),
    /// List the running VMs.
    Ls(vms::LsArgs),
    /// Show one VM.
    Info(vms::InfoArgs),
    /// Stop the guest's vCPUs.
    Pause(Vm),
    /// Let a paused guest go on.
    Resume(Vm),
    /// Press the guest's power button and wait until it is off.
    Stop(vms::StopArgs),
    /// Tell what this host can do, by trying.
    Doctor {
        /// Tell what keeps this device from a guest: a PCI address, or a path below /sys.
        #[arg(long, value_name = "BDF")]
        device: Option<HostDevice>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// The VM that is meant.
#[derive(Debug, clap::Args)]
struct Vm {
    /// The VM's name; may be left out when one runs.
    #[arg(long, value_name = "N")]
    vm: Option<VmName>,
}

impl Vm {
    fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect(&RuntimeDir::open()?, self.vm.as_ref())?)
    }

    fn tell(&self, request: &Request) -> Outcome {
        self.connect()?.ask::<()>(request)?;
        Ok(ExitCode::SUCCESS)
    }
}

type Failure = Box<dyn Error>;
type Outcome = Result<ExitCode, Failure>;

/// Parses the command line, does what it says, reports errors, one line each, and returns the
/// exit status.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = match Cli::try_parse() {
        Ok(cli) => obey(cli.command),
        Err(error) if error.use_stderr() => {
            complain(&usage(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(help) => print(&help.to_string()),
    };
    outcome.unwrap_or_else(|error| {
        complain(&cause::chain(&*error));
        ExitCode::FAILURE
    })
}

fn obey(command: Command) -> Outcome {
    match command {
        Command::Run(args) => Ok(report_end(session::run(args.begin()?)?)),
        Command::Migrate(args) => args.migrate(),
        Command::Snapshot(args) => args.write(),
        Command::Cancel(vm) => vm.tell(&Request::Cancel {}),
        Command::Resolve(args) => args.resolve(),
        Command::Plug(args) => args.plug(),
        Command::Unplug(args) => args.unplug(),
        Command::Ls(args) => args.list(),
        Command::Info(args) => args.show(),
        Command::Pause(vm) => vm.tell(&Request::Pause {}),
        Command::Resume(vm) => vm.tell(&Request::Resume {}),
        Command::Stop(args) => args.stop(),
        Command::Doctor { device, json } => {
            let findings = device.as_ref().map_or_else(doctor::examine, doctor::examine_device);
            let text = if json { findings.json() } else { findings.table() };
            print(&text)?;
            Ok(if findings.can_run() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn report_end(ending: Ending) -> ExitCode {
    match ending {
        Ending::Off | Ending::Quit | Ending::Migrated => ExitCode::SUCCESS,
        Ending::Died(why) => {
            complain(&format!("the guest died: {}", cause::one_line(&why)));
            ExitCode::from(3)
        }
        Ending::Signal(number) => ExitCode::from(128 + u8::try_from(number & 0x7f).unwrap_or(0)),
    }
}

/// What is wrong with the command line, on one line, from clap's page about it.
fn usage(page: &str) -> String {
    let what = page.split("\n\nUsage:").next().unwrap_or(page);
    let what = what.split("\n\nFor more information").next().unwrap_or(what);
    let what = what.strip_prefix("error: ").unwrap_or(what);
    // Asked without a command, clap answers with the help page and no error.
    let what = if page.starts_with("error: ") { what } else { "a command is missing" };
    format!("{}: see `uvmm --help`", cause::one_line(what))
}

/// Tells the user, who may no longer be there.
fn complain(what: &str) {
    let _ = writeln!(io::stderr(), "uvmm: {what}");
}

/// Writes to standard output; a reader that has seen enough is no error.
fn print(text: &str) -> Outcome {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to standard output: {error}").into())
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn complaint(line: &str) -> String {
        usage(&Cli::try_parse_from(line.split(' ')).unwrap_err().to_string())
    }

    #[test]
    fn a_wrong_command_line_is_one_line() {
        for (line, says) in [
            ("uvmm", "a command is missing"),
            ("uvmm fly", "unrecognized subcommand 'fly'"),
            ("uvmm run --speed 3", "unexpected argument '--speed'"),
            ("uvmm run --memory lots", "\"lots\" is not a size"),
            ("uvmm run --serial tape", "write stdio, null, file=F or socket=F"),
            ("uvmm run --name a/b", "\"a/b\" is not a VM name"),
            ("uvmm run --device vfio,id=a", "needs host="),
            ("uvmm doctor --device eth0", "0000:01:10.0"),
            ("uvmm migrate", "--to"),
            ("uvmm migrate --to host", "write HOST:PORT"),
            ("uvmm migrate --to h:1 --downtime-limit 3", "write a number and a unit"),
            ("uvmm migrate --to h:1 --shared-memory --streams 2", "cannot be used with"),
            ("uvmm snapshot", "<FILE>"),
            ("uvmm plug", "--device"),
            ("uvmm plug --device vfio,id=n", "needs host="),
            ("uvmm unplug", "<ID>"),
            ("uvmm unplug a/b", "not a device's id"),
            ("uvmm unplug net0 --timeout 3", "write a number and a unit"),
            ("uvmm resolve --run-here --discard", "cannot be used with"),
        ] {
            let text = complaint(line);
            assert!(text.contains(says) && !text.contains('\n'), "{line}: {text}");
            assert!(text.ends_with("see `uvmm --help`"), "{text}");
        }
    }

    #[test]
    fn a_dead_guest_and_a_signal_have_exit_statuses_of_their_own() {
        assert_eq!(report_end(Ending::Off), ExitCode::SUCCESS);
        assert_eq!(report_end(Ending::Died("triple fault".into())), ExitCode::from(3));
        assert_eq!(report_end(Ending::Signal(15)), ExitCode::from(143));
    }
}
