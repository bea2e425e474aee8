//! `uvmm resolve`: a migration whose outcome is not known is decided by a person.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Args;

use super::{Outcome, Vm, print};
use crate::config::VmName;
use crate::control::{Decision, Request, Undecided};

#[derive(Debug, Args)]
pub(super) struct ResolveArgs {
    #[command(flatten)]
    vm: Vm,
    /// Let the guest go on here: only when it does not run at the destination and never will.
    #[arg(long, conflicts_with = "discard")]
    run_here: bool,
    /// End the guest here: only when it runs at the destination.
    #[arg(long)]
    discard: bool,
    /// Do not ask again.
    #[arg(long)]
    yes: bool,
}

impl ResolveArgs {
    pub(super) fn resolve(&self) -> Outcome {
        let client = self.vm.connect()?;
        let name = client.name().clone();
        let undecided: Option<Undecided> = client.ask(&Request::Resolve { decision: None })?;
        let decision = match (self.run_here, self.discard) {
            (true, _) => Decision::RunHere,
            (_, true) => Decision::Discard,
            _ => return print(&page(&name, undecided.as_ref())),
        };
        let Some(undecided) = undecided else {
            return Err(format!("{name} has no undecided migration").into());
        };
        if !self.yes {
            confirm(warning(decision), &undecided)?;
        }
        // The same VM as shown, whichever others run by now.
        let vm = Vm { vm: Some(name) };
        vm.connect()?.ask::<()>(&Request::Resolve { decision: Some(decision) })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn page(name: &VmName, undecided: Option<&Undecided>) -> String {
    let Some(Undecided { token, to, stopped_s }) = undecided else {
        return format!("{name} has no undecided migration.\n");
    };
    format!(
        "{name} was stopped {stopped_s} s ago to be migrated to {to}, which may run it now: it \
         could not be asked.\nThe migration's token is {token}.\n\
         Look at the destination (`uvmm ls` there), then choose here:\n  \
         uvmm resolve --vm {name} --run-here   if the guest does not run there and never will\n  \
         uvmm resolve --vm {name} --discard    if it runs there\n"
    )
}

fn warning(decision: Decision) -> &'static str {
    match decision {
        Decision::RunHere => {
            "If the guest also runs at the destination, both will write to the same disks and \
             answer to the same addresses."
        }
        Decision::Discard => {
            "If the guest does not run at the destination, its memory is lost for good."
        }
    }
}

fn confirm(warning: &str, undecided: &Undecided) -> Result<(), String> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(format!("{warning} Confirm with --yes"));
    }
    let mut stderr = io::stderr();
    let to = &undecided.to;
    let _ = write!(stderr, "{warning}\nThe destination is {to}. Type yes to go on: ");
    let mut answer = String::new();
    let read = stdin.read_line(&mut answer);
    match read {
        Ok(_) if answer.trim() == "yes" => Ok(()),
        _ => Err("nothing was decided".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_says_what_to_do_in_each_case() {
        let name: VmName = "web".parse().unwrap();
        let undecided =
            Undecided { token: "c0ffee".into(), to: "h:1".parse().unwrap(), stopped_s: 9 };
        let page_of_one = page(&name, Some(&undecided));
        for part in ["c0ffee", "tcp:h:1", "--vm web --run-here", "--vm web --discard", "9 s ago"] {
            assert!(page_of_one.contains(part), "{page_of_one}");
        }
        assert_eq!(page(&name, None), "web has no undecided migration.\n");
    }
}
