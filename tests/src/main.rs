//! `cargo lab`: a host with KVM, VFIO and SR-IOV on any machine, and what runs in it.
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use tests::artefacts::{self, Artefacts, Profile};
use tests::host::{Lab, Nesting, agent, pass_on};
use tests::tier::INSIDE;
use tests::{bench, install, suite};

/// A lab host for uvmm: an emulated machine with KVM, an IOMMU and SR-IOV NICs, on any machine.
#[derive(Parser)]
#[command(bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the main job: boots a Linux guest and migrates it while it works.
    Demo,
    /// Runs every test there is, each where it can run.
    Test {
        /// Only tests whose names contain this.
        filter: Option<String>,
    },
    /// Measures uvmm against QEMU and against sockets alone.
    Bench {
        /// Only this; without it, everything.
        #[arg(value_enum)]
        what: Option<What>,
        /// Runs of each kind; their median counts.
        #[arg(long, default_value_t = bench::RUNS)]
        runs: usize,
        /// Print one JSON array of figures on stdout, one for each place that is measured in.
        #[arg(long)]
        json: bool,
    },
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
    /// The tests of one program inside the lab host.
    #[command(hide = true)]
    TestInside {
        #[arg(long)]
        filter: Option<String>,
        program: PathBuf,
    },
    /// The part of the demo inside the lab host.
    #[command(hide = true)]
    DemoInside,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Migrations of the tiny guest, on this machine's own KVM.
    Migration,
    /// Hand-overs of the tiny guest between processes of this machine.
    Handover,
    /// Boots of a Linux guest, in the lab host.
    Boot,
    /// Moves of a Linux guest with a virtual function, in the lab host.
    Passthrough,
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
        Command::Demo => in_lab(&["demo-inside"]),
        Command::Test { filter } => test(filter.as_deref()),
        Command::Bench { what, runs, json } => measure(what, runs, json),
        Command::TestInside { filter, program } => {
            Ok(u8::from(!suite::inside::run(&program, filter.as_deref())?))
        }
        Command::DemoInside => Ok(tests::demo::run().map(|()| 0)?),
        Command::Agent => Ok(agent::serve().map(|()| 0)?),
    }
}

/// How long the demo, or a measurement, has nothing to say at most.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Runs another command of this program inside a lab host.
fn in_lab(arguments: &[&str]) -> anyhow::Result<u8> {
    eprintln!("lab: preparing uvmm, kernels and the lab host (by {})", Nesting::here());
    let artefacts = Artefacts::prepare(Profile::Release).context("the lab cannot be prepared")?;
    let mut command = vec![env::current_exe()?.into_os_string()];
    command.extend(arguments.iter().map(OsString::from));
    let status = Lab::boot(&artefacts)?.run(&command, &[(INSIDE, "1")], SILENCE, pass_on)?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

fn test(filter: Option<&str>) -> anyhow::Result<u8> {
    eprintln!("lab: preparing uvmm, kernels and the lab host (by {})", Nesting::here());
    let artefacts = Artefacts::prepare(Profile::Quick).context("the lab cannot be prepared")?;
    let parts = suite::run(&artefacts, filter)?;
    println!("\nlab: summary");
    for part in &parts {
        println!("  {part}");
    }
    Ok(u8::from(!parts.iter().all(suite::Part::passed)))
}

/// What is measured on this machine first; then the rest, each in a lab host of its own.
fn measure(what: Option<What>, runs: usize, json: bool) -> anyhow::Result<u8> {
    let wanted = |this| what.is_none_or(|what| what == this);
    if env::var_os(INSIDE).is_some() {
        return measure_inside(what, runs, json);
    }
    let mut status = 0;
    if wanted(What::Migration) {
        install::programs()?;
        let rows = bench::migration::migrations(artefacts::uvmm(Profile::Release)?, runs)?;
        let title = "the tiny guest, one vCPU, on this machine's own KVM, loopback TCP";
        status = show(&format!("{title}, median of {runs} runs"), &rows, json)?;
    }
    if wanted(What::Handover) {
        let rows = bench::handover::handovers(artefacts::uvmm(Profile::Release)?, runs)?;
        let title = "the tiny guest, one vCPU, a fifth of memory filled, on this machine's own KVM";
        status |= show(&format!("{title}, median of {runs} hand-overs"), &rows, json)?;
    }
    for (what, name) in [(What::Boot, "boot"), (What::Passthrough, "passthrough")] {
        if wanted(what) {
            let runs = runs.to_string();
            let arguments =
                [&["bench", name, "--runs", &runs][..], if json { &["--json"] } else { &[] }];
            status |= in_lab(&arguments.concat())?;
        }
    }
    Ok(status)
}

/// What is measured in the lab host.
fn measure_inside(what: Option<What>, runs: usize, json: bool) -> anyhow::Result<u8> {
    let (title, rows) = match what {
        Some(What::Boot) => (
            format!("one vCPU, 256 MiB, the kernel as an ELF file, median of {runs} boots"),
            bench::boot::boots(runs)?,
        ),
        Some(What::Passthrough) => (
            format!("a Linux guest with a virtual function, median of {runs} trips each way"),
            bench::passthrough::trips(runs)?,
        ),
        Some(What::Migration | What::Handover) | None => {
            anyhow::bail!("that is not measured in the lab host")
        }
    };
    show(&title, &rows, json)
}

fn show(title: &str, rows: &[bench::Row], json: bool) -> anyhow::Result<u8> {
    if json {
        println!("{}", serde_json::to_string_pretty(rows)?);
    } else {
        println!("{title}:");
        rows.iter().for_each(|row| println!("  {row}"));
    }
    Ok(u8::from(!rows.iter().all(bench::Row::ok)))
}

fn exec(command: &[OsString], terminal: bool) -> anyhow::Result<u8> {
    let artefacts = Artefacts::prepare(Profile::Release).context("the lab cannot be prepared")?;
    let status = Lab::boot(&artefacts)?.exec(command, terminal)?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}
