//! `uvmm resolve`: a migration whose outcome is not known is decided by the destination, or by a
//! person.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Args;
use migration::handover::{Giving, Handover, Token};
use migration::patience::Patience;
use migration::record::{FileRecord, Record, Role, Side, Written};

use super::{Failure, Outcome, Vm, print};
use crate::config::{Address, VmName};
use crate::control::{Client, Decision, Request, RuntimeDir, StateDir, Undecided};
use crate::migrate::ask_at;

#[derive(Debug, Args)]
pub(super) struct ResolveArgs {
    #[command(flatten)]
    vm: Vm,
    /// The migration's token, where several are undecided.
    #[arg(long, value_name = "TOKEN", value_parser = token)]
    token: Option<Token>,
    /// Ask the destination again, and do as it says.
    #[arg(long, conflicts_with_all = ["run_here", "discard", "forget"])]
    ask: bool,
    /// Let the guest go on here: only when it does not run at the destination and never will.
    #[arg(long, conflicts_with_all = ["discard", "forget"])]
    run_here: bool,
    /// End the guest here: only when it runs at the destination.
    #[arg(long, conflicts_with = "forget")]
    discard: bool,
    /// Forget a migration whose VM has ended, so that its guest may be booted again.
    #[arg(long)]
    forget: bool,
    /// Do not ask the user again.
    #[arg(long)]
    yes: bool,
}

fn token(text: &str) -> Result<Token, &'static str> {
    text.parse()
}

/// A migration that nobody knows the end of.
enum Open {
    /// Its VM stands still and waits.
    Waiting(VmName, Undecided),
    /// Its VM has ended.
    Left(Written),
}

impl ResolveArgs {
    pub(super) fn resolve(&self) -> Outcome {
        let open = self.open()?;
        if !(self.ask || self.run_here || self.discard || self.forget) {
            let pages = open.iter().map(Open::page).collect::<Vec<_>>();
            let none = "there is no undecided migration\n".to_owned();
            return print(&if pages.is_empty() { none } else { pages.join("\n") });
        }
        let one = match &open[..] {
            [one] => one,
            [] => return Err("there is no undecided migration".into()),
            _ => return Err("several migrations are undecided: choose one with --token".into()),
        };
        match one {
            Open::Waiting(name, undecided) => self.decide_waiting(name, undecided),
            Open::Left(written) => self.decide_left(written),
        }
    }

    /// All that are meant.
    fn open(&self) -> Result<Vec<Open>, Failure> {
        let wanted = self.vm.vm.as_ref();
        let dir = RuntimeDir::open()?;
        let left = StateDir::find()?.undecided()?;
        let mut open: Vec<_> = left
            .into_iter()
            .filter(|written| wanted.is_none_or(|name| name.as_str() == written.about.name))
            .map(Open::Left)
            .collect();
        let living = dir.living()?;
        if open.is_empty() && wanted.is_some_and(|name| !living.contains(name)) {
            self.vm.connect()?; // which says what else there is
        }
        for name in living.into_iter().filter(|name| wanted.is_none_or(|wanted| wanted == name)) {
            let client = Client::connect(&dir, Some(&name))?;
            let undecided =
                client.ask::<Option<Undecided>>(&Request::Resolve { decision: None })?;
            open.extend(undecided.map(|undecided| Open::Waiting(name, undecided)));
        }
        let named = |open: &Open| self.token.is_none_or(|token| token.to_string() == open.token());
        open.retain(named);
        Ok(open)
    }

    fn decide_waiting(&self, name: &VmName, undecided: &Undecided) -> Outcome {
        if self.ask {
            let token = undecided.token.parse::<Token>()?;
            let told = Told { name: name.clone() };
            return ask(token, &undecided.to, Box::new(told), "it goes on here");
        }
        let decision = match (self.run_here, self.discard) {
            (true, _) => Decision::RunHere,
            (_, true) => Decision::Discard,
            _ => {
                return Err(
                    format!("{name} waits for a decision: use --run-here or --discard").into()
                );
            }
        };
        if !self.yes {
            confirm(warning(decision), &undecided.to.to_string())?;
        }
        tell(name, decision)?;
        Ok(ExitCode::SUCCESS)
    }

    fn decide_left(&self, written: &Written) -> Outcome {
        let name = &written.about.name;
        if self.run_here || self.discard {
            let gone =
                "its process has ended, and its memory with it: use --forget, then `uvmm run`";
            return Err(format!("{name} cannot go on here: {gone}").into());
        }
        let dir = StateDir::find()?;
        let taken = FileRecord::take_over(dir.path(), written.token, Side::Source)?;
        let Some((_, mut record)) = taken else {
            return Err(format!("someone else is deciding migration {}", written.token).into());
        };
        if self.ask {
            let to: Address = written.about.peer.parse()?;
            return ask(written.token, &to, Box::new(record), "it may be booted here again");
        }
        if !self.yes {
            let boots = "If the guest runs at the destination, booting it here again makes two.";
            confirm(boots, &written.about.peer)?;
        }
        record.forget(written.token)?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Open {
    fn token(&self) -> String {
        match self {
            Self::Waiting(_, undecided) => undecided.token.clone(),
            Self::Left(written) => written.token.to_string(),
        }
    }

    fn page(&self) -> String {
        match self {
            Self::Waiting(name, Undecided { token, to, stopped_s }) => format!(
                "{name} was stopped {stopped_s} s ago to be migrated to {to}, which may run it \
                 now: it could not be asked.\nThe migration's token is {token}.\n\
                 Ask it again, or look at the destination (`uvmm ls` there) and choose here:\n  \
                 uvmm resolve --vm {name} --ask        does what the destination says\n  \
                 uvmm resolve --vm {name} --run-here   if the guest does not run there and never \
                 will\n  \
                 uvmm resolve --vm {name} --discard    if it runs there\n"
            ),
            Self::Left(Written { token, about, since, .. }) => {
                let name = &about.name;
                let ago = SystemTime::now().duration_since(*since).unwrap_or_default().as_secs();
                format!(
                    "{name} was given away to {} {ago} s ago, which may run it now: its process \
                     here ended before it knew.\nThe migration's token is {token}.\n\
                     It is not booted here under that name before that is known:\n  \
                     uvmm resolve --token {token} --ask      asks the destination\n  \
                     uvmm resolve --token {token} --forget   if it does not run there and never \
                     will\n",
                    about.peer
                )
            }
        }
    }
}

/// Asks the destination, which hears DONE once `record` knows what it said.
fn ask(token: Token, to: &Address, record: Box<dyn Record>, back: &str) -> Outcome {
    let mut handover = Handover::gave(token, Giving::Asked, record);
    match ask_at(to, &mut handover, &Patience::default())? {
        Giving::Given => print(&format!("the guest runs at {to}\n")),
        Giving::Back => print(&format!("the guest does not run at {to} and never will: {back}\n")),
        Giving::Asked | Giving::Mine | Giving::Awaited => {
            Err(format!("{to} knows nothing of migration {token}: is it the right one?").into())
        }
    }
}

fn tell(name: &VmName, decision: Decision) -> Result<(), Failure> {
    // The same VM as shown, whichever others run by now.
    let vm = Vm { vm: Some(name.clone()) };
    Ok(vm.connect()?.ask::<()>(&Request::Resolve { decision: Some(decision) })?)
}

/// A VM that waits writes down itself what it is told.
struct Told {
    name: VmName,
}

impl Record for Told {
    fn write(&mut self, _: Token, role: Role) -> io::Result<()> {
        let decision = match role {
            Role::Source(Giving::Back) => Decision::RunHere,
            Role::Source(Giving::Given) => Decision::Discard,
            _ => return Ok(()),
        };
        tell(&self.name, decision).map_err(|error| io::Error::other(error.to_string()))
    }

    fn forget(&mut self, _: Token) -> io::Result<()> {
        Ok(())
    }

    fn earlier(&self, _: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
        Ok(None)
    }
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

fn confirm(warning: &str, to: &str) -> Result<(), String> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(format!("{warning} Confirm with --yes"));
    }
    let mut stderr = io::stderr();
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
    fn the_page_says_what_to_do() {
        let undecided =
            Undecided { token: "c0ffee".into(), to: "h:1".parse().unwrap(), stopped_s: 9 };
        let page = Open::Waiting("web".parse().unwrap(), undecided).page();
        for part in ["c0ffee", "tcp:h:1", "--vm web --run-here", "--vm web --discard", "9 s ago"] {
            assert!(page.contains(part), "{page}");
        }
    }
}
