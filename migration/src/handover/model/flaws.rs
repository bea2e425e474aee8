//! Rules of the hand-over, each broken once.

use super::letters::Letter;
use super::world::World;
use crate::handover::{Giving, Taking, Verdict};
use crate::record::Role;

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A source that gave the guest away takes it back unasked.
    ResumesAlone,
    /// A source takes *unknown* for *never*.
    UnknownIsRefusal,
    /// A source gives the guest away without writing that down.
    AskedIsNotWritten,
    /// A source that crashed boots the guest again without looking at its records.
    BootsUnasked,
    /// A source says DONE though it could not write down what it heard.
    DoneIsNotWritten,
    /// A destination says that it never runs the guest, and is not bound by it.
    AnswersUnbound,
    /// A destination is READY without writing that down.
    ReadyIsNotWritten,
    /// A destination runs the guest without writing that down.
    RunningIsNotWritten,
    /// A destination says what it could not write down, though other things may be written there.
    TellsWhatIsNotWritten,
    /// A destination that loses its source runs the guest.
    RunsUncommitted,
    /// A destination forgets what it decided once it told that.
    ForgetsUnheard,
}

const TWO: &str = "never two runners";
const NONE: &str = "one runner once all can talk";

impl Flaw {
    /// Each, with the promise that it breaks.
    pub(super) const ALL: [(Self, &'static str); 11] = [
        (Self::ResumesAlone, TWO),
        (Self::UnknownIsRefusal, TWO),
        (Self::AskedIsNotWritten, TWO),
        (Self::BootsUnasked, TWO),
        (Self::DoneIsNotWritten, NONE),
        (Self::AnswersUnbound, TWO),
        (Self::ReadyIsNotWritten, NONE),
        (Self::RunningIsNotWritten, TWO),
        (Self::TellsWhatIsNotWritten, TWO),
        (Self::RunsUncommitted, "no run without COMMIT"),
        (Self::ForgetsUnheard, NONE),
    ];

    /// Whether `role` is lost instead of written.
    pub(super) fn loses(self, role: Role) -> bool {
        match self {
            Self::AskedIsNotWritten => role == Role::Source(Giving::Asked),
            Self::ReadyIsNotWritten => role == Role::Destination(Taking::Ready),
            Self::RunningIsNotWritten => role == Role::Destination(Taking::Running),
            _ => false,
        }
    }
}

impl World {
    /// What a source hears, which may hear badly.
    pub(super) fn heard(verdict: Verdict, flaw: Option<Flaw>) -> Verdict {
        match (verdict, flaw) {
            (Verdict::Unknown, Some(Flaw::UnknownIsRefusal)) => Verdict::Refused,
            (verdict, _) => verdict,
        }
    }

    /// What a flawed destination says to a query, if it differs.
    pub(super) fn misspoken(&mut self, number: usize, flaw: Option<Flaw>) -> Option<Letter> {
        let there = self.destinations[number].as_ref()?;
        let refused = Some(Letter::Answer(number, Verdict::Refused));
        match (flaw?, there.state) {
            (Flaw::AnswersUnbound, Taking::Ready) => refused,
            (Flaw::TellsWhatIsNotWritten, Taking::Dead) => refused,
            _ => None,
        }
    }
}
