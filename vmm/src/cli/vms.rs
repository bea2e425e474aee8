//! Looking at running VMs and stopping them: `ls`, `info` and `stop`.

use std::fmt::Write;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::{Outcome, Vm, duration, print};
use crate::cause;
use crate::config::{Size, VmName};
use crate::control::{Client, ClientError, Info, Request, RuntimeDir, State};

/// How long a VM may take to end after it said that it will, when it is forced.
const FORCED_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// Print one JSON array.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    #[command(flatten)]
    vm: Vm,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct StopArgs {
    #[command(flatten)]
    vm: Vm,
    /// Do not ask the guest: end the VM at once.
    #[arg(long)]
    force: bool,
    /// How long the guest may take to power off.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration::parse)]
    timeout: Duration,
}

impl LsArgs {
    pub(super) fn list(&self) -> Outcome {
        let dir = RuntimeDir::open()?;
        let ask = |name: VmName| {
            let info = Client::connect(&dir, Some(&name)).and_then(|c| c.ask(&Request::Info {}));
            (name, info)
        };
        let vms: Vec<_> = dir.living()?.into_iter().map(ask).collect();
        if self.json {
            let row = |(name, info): &(VmName, Result<Info, ClientError>)| match info {
                Ok(info) => json!(info),
                Err(error) => json!({ "name": name, "error": cause::chain(error) }),
            };
            let rows: Vec<Value> = vms.iter().map(row).collect();
            return print(&format!("{}\n", json!(rows)));
        }
        print(&table(&vms))
    }
}

fn table(vms: &[(VmName, Result<Info, ClientError>)]) -> String {
    let width = vms.iter().map(|(name, _)| name.as_str().len()).max().unwrap_or(0).max(8);
    let mut rows = vec![format!(
        "{:width$}  {:10} {:>4} {:>8} {:>8}",
        "NAME", "STATE", "CPUS", "MEMORY", "PID"
    )];
    for (name, info) in vms {
        rows.push(match info {
            Ok(Info { state, cpus, memory, pid, .. }) => {
                let (state, memory) = (word(*state), Size(*memory).to_string());
                format!("{name:width$}  {state:10} {cpus:>4} {memory:>8} {pid:>8}")
            }
            Err(error) => format!("{name:width$}  {:10} {}", "silent", cause::chain(error)),
        });
    }
    rows.join("\n") + "\n"
}

fn word(state: State) -> &'static str {
    match state {
        State::Running => "running",
        State::Paused => "paused",
        State::Migrating => "migrating",
        State::Incoming => "incoming",
        State::Undecided => "undecided",
    }
}

impl InfoArgs {
    pub(super) fn show(&self) -> Outcome {
        let info: Info = self.vm.connect()?.ask(&Request::Info {})?;
        if self.json {
            return print(&format!("{}\n", json!(info)));
        }
        print(&page(&info))
    }
}

fn page(info: &Info) -> String {
    let mut page = String::new();
    let mut row = |what: &str, value: String| {
        writeln!(page, "{what:<12} {value}").expect("a string takes everything");
    };
    row("name", info.name.to_string());
    row("state", word(info.state).to_owned());
    row("vCPUs", info.cpus.to_string());
    if !info.cpu.is_empty() {
        row("processors", info.cpu.clone());
    }
    row("memory", Size(info.memory).to_string());
    row("process", info.pid.to_string());
    row("uptime", format!("{:.1?}", Duration::from_millis(info.uptime_ms)));
    row("serial", info.serial.to_string());
    if let Some(address) = &info.incoming {
        row("waits at", address.to_string());
    }
    if let Some(progress) = &info.migration {
        let sent = progress.bytes_sent >> 20;
        let phase = &progress.phase;
        row("migration", format!("{phase}, round {}, {sent} MiB sent", progress.round));
    }
    for slot in &info.slots {
        row(&format!("slot {}", slot.number), slot.to_string());
    }
    for (name, count) in &info.counters {
        row(name, count.to_string());
    }
    page
}

impl StopArgs {
    pub(super) fn stop(&self) -> Outcome {
        let client = self.vm.connect()?;
        let name = client.name().clone();
        match client.ask::<()>(&Request::Stop { force: self.force }) {
            // It may be gone before its answer is.
            Ok(()) | Err(ClientError::Closed { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let limit = if self.force { FORCED_LIMIT } else { self.timeout };
        let (dir, asked) = (RuntimeDir::open()?, Instant::now());
        while dir.is_living(&name) {
            if asked.elapsed() > limit {
                let remedy = if self.force {
                    "its process does not respond".to_owned()
                } else {
                    format!("it may ignore its power button: `uvmm stop --force --vm {name}`")
                };
                return Err(format!("{name} did not end within {limit:.0?}: {remedy}").into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Info {
        serde_json::from_value(json!({
            "name": "web", "state": "running", "cpus": 2, "memory": 5u64 << 30, "pid": 42,
            "uptime_ms": 1500, "serial": "null", "incoming": null, "migration": null,
            "counters": {"exits": 7},
        }))
        .unwrap()
    }

    #[test]
    fn the_list_has_a_row_for_every_vm_even_for_one_that_is_silent() {
        let name: VmName = "web".parse().unwrap();
        let silent = ClientError::Silent { name: name.clone() };
        let table = table(&[(name.clone(), Ok(info())), (name, Err(silent))]);
        let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["NAME", "STATE", "CPUS", "MEMORY", "PID"]);
        assert_eq!(rows[1], ["web", "running", "2", "5G", "42"]);
        assert_eq!(rows[2][..2], ["web", "silent"]);
    }

    #[test]
    fn the_page_shows_counters_and_hides_what_is_not_there() {
        let page = page(&info());
        assert!(
            page.contains("uptime       1.5s\n") && page.ends_with("exits        7\n"),
            "{page}"
        );
        assert!(!page.contains("waits at"), "{page}");
    }
}
