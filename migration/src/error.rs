//! Why a migration stopped, and who has the guest now.

use std::error;
use std::fmt;
use std::io;
use std::time::Duration;

use crate::answering::Answering;
use crate::compat::Mismatch;
use crate::handover::Token;
use crate::plan::{PlanError, StepFailure};
use crate::ram::DirtyError;
use crate::report::{Report, Status};
use crate::snapshot::Damage;
use crate::state::StateError;
use crate::wire::PeerError;

const MIB: f64 = 1048576.0;
/// Bytes of mismatches behind which no other is told, far below what a control socket carries.
const LISTED: usize = 8 << 10;

/// Why a migration stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something in the machine cannot be moved.
    #[error("this guest cannot leave")]
    Stays(#[source] StepFailure),
    /// Nobody answers there.
    #[error("cannot connect to the destination: check the address, and that uvmm waits there")]
    Connect(#[source] io::Error),
    /// Nothing can arrive here.
    #[error("cannot accept connections")]
    Listen(#[source] io::Error),
    /// No name can be given to the migration.
    #[error("cannot get random bytes from the kernel")]
    Random(#[source] io::Error),
    /// The peer, or the way to it.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The memory itself cannot be passed to another process.
    #[error("cannot share the memory of this guest: migrate without shared memory")]
    Unshareable(#[source] io::Error),
    /// The destination did not take it.
    #[error(
        "the destination did not take the memory itself: have the same uvmm wait there at a Unix \
         socket, or migrate without shared memory"
    )]
    Unshared(#[source] PeerError),
    /// The destination cannot take the guest: everything that stands against it.
    #[error("the destination cannot take this guest: {}", listed(.0))]
    Refused(Vec<Mismatch>),
    /// A step towards a still guest failed; those before it were taken back.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Nobody knows what the guest wrote.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The guest writes faster than the connection carries, and was not to be moved at that price.
    #[error(
        "the guest writes {:.0} MiB of memory per second and would have to stand still for \
         {:.1?}, more than {limit:?}: allow it to be slowed down (--on-no-convergence throttle) or \
         stopped for longer (stop, or a larger --downtime-limit)",
        dirtied / MIB, stop
    )]
    NoConvergence {
        /// Bytes per second that became dirty, each page counted once in a pass.
        dirtied: f64,
        /// How long it would have stood still.
        stop: Duration,
        /// How long it may.
        limit: Duration,
    },
    /// The state could not be saved or loaded.
    #[error("cannot move the state of the machine")]
    State(#[from] StateError),
    /// Something writes guest memory that should stand still: a fault of uvmm.
    #[error("{name} wrote guest memory at {address:#x} after the last of it was sent")]
    WroteTooLate {
        /// The dirty source that tells.
        name: String,
        /// Guest-physical address of the first page.
        address: u64,
    },
    /// What arrived is not what was sent.
    #[error("what arrived is not what was sent: migrate again")]
    Totals,
    /// The decision could not be written down, so it was not taken.
    #[error("cannot write down who has the guest: free some space, then migrate again")]
    Record(#[source] io::Error),
    /// The destination got the guest and could not start it. It runs at the source.
    #[error("cannot start the guest")]
    Start(#[source] StepFailure),
    /// The destination never ran the guest and never will. It runs at the source.
    #[error("the destination gave the guest back: see what it printed")]
    GivenBack,
    /// The source asked who has the guest before it gave it away, and was told that it keeps it.
    #[error("the source took the guest back")]
    TakenBack,
    /// Nobody could be asked whether the destination runs the guest.
    #[error(
        "undecided: the guest was given away in migration {token}, and the destination cannot be \
         asked whether it runs: look there; resume here only if it cannot be running there"
    )]
    Undecided {
        /// Names the migration.
        token: Token,
    },
    /// The guest cannot be written to a file.
    #[error("cannot write the snapshot: see whether there is space for it")]
    Write(#[source] io::Error),
    /// A file gives no guest.
    #[error("cannot use this snapshot")]
    Snapshot(#[source] Damage),
    /// This host cannot take the guest of a snapshot: everything that stands against it.
    #[error("this host cannot take the guest: {}", listed(.0))]
    Misfit(Vec<Mismatch>),
    /// Someone wished to stop.
    #[error("cancelled")]
    Cancelled,
    /// What the guest was to be given is no longer to be had.
    #[error("{0}")]
    Withdrawn(String),
}

impl Error {
    /// Whether someone wished to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled | Self::Peer(PeerError::Cancelled))
    }

    /// How a migration ended that this stopped.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            _ if self.is_cancelled() => Status::Cancelled,
            Self::Undecided { .. } => Status::Undecided,
            _ => Status::Failed,
        }
    }
}

/// A migration that did not complete. Where the guest is, `report.status` tells.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: Error,
    /// What it cost.
    pub report: Report,
    /// At the destination: tells the source that the guest never runs here, if it can be that it
    /// asks. Let it finish before the process ends.
    pub answering: Option<Answering>,
}

impl Failure {
    pub(crate) fn of(error: Error, mut report: Report) -> Box<Self> {
        report.status = error.status();
        report.error = Some(one_line(&error));
        Box::new(Self { error, report, answering: None })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl error::Error for Failure {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.error.source()
    }
}

/// `error` and its causes in one line.
#[must_use]
pub fn one_line(error: &dyn error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The mismatches, as many as fit: a peer may have written them, and reports are to reach whoever
/// asked for the migration.
fn listed(mismatches: &[Mismatch]) -> String {
    let mut told = String::new();
    for (number, mismatch) in mismatches.iter().enumerate() {
        if told.len() > LISTED {
            return format!("{told}; and {} more", mismatches.len() - number);
        }
        let separator = if number == 0 { "" } else { "; " };
        told = format!("{told}{separator}{mismatch}");
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(count: usize, text: &str) -> String {
        let [path, wanted, found, remedy] = [(); 4].map(|()| text.to_owned());
        let error = Error::Refused(vec![Mismatch { path, wanted, found, remedy }; count]);
        Failure::of(error, Report::default()).report.error.unwrap()
    }

    #[test]
    fn all_that_an_honest_destination_minds_is_told() {
        let told = of(50, "some name, or a value");
        assert_eq!(told.matches("; ").count(), 49);
        assert!(!told.contains("more"));
    }

    #[test]
    fn however_much_a_destination_minds_the_report_stays_short() {
        for text in ["", "x", "\u{10ffff}\"", &"\u{1f4a5}".repeat(2000)] {
            let told = of(1000, text);
            assert!(told.len() < 12 << 10, "{} bytes", told.len());
            let listed = told.matches("; ").count();
            assert!(told.ends_with(&format!("; and {} more", 1000 - listed)), "{listed}");
        }
    }
}
