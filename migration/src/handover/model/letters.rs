//! What the two sides say, over a network that forgets nothing.

use super::ATTEMPTS;
use crate::handover::Verdict;

/// What is said, about an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Letter {
    Ready(usize),
    Commit(usize),
    Running(usize),
    Query(usize),
    Answer(usize, Verdict),
    Done(usize),
}

/// What was ever said: the network may deliver it again at any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Letters(u32);

const KINDS: usize = 8;

impl Letters {
    pub(super) fn all() -> impl Iterator<Item = Letter> {
        let verdicts = [Verdict::Running, Verdict::Refused, Verdict::Unknown];
        (0..ATTEMPTS).flat_map(move |at| {
            let plain = [
                Letter::Ready(at),
                Letter::Commit(at),
                Letter::Running(at),
                Letter::Query(at),
                Letter::Done(at),
            ];
            plain.into_iter().chain(verdicts.map(|verdict| Letter::Answer(at, verdict)))
        })
    }

    fn bit(letter: Letter) -> u32 {
        let (at, kind) = match letter {
            Letter::Ready(at) => (at, 0),
            Letter::Commit(at) => (at, 1),
            Letter::Running(at) => (at, 2),
            Letter::Query(at) => (at, 3),
            Letter::Done(at) => (at, 4),
            Letter::Answer(at, Verdict::Running) => (at, 5),
            Letter::Answer(at, Verdict::Refused) => (at, 6),
            Letter::Answer(at, Verdict::Unknown) => (at, 7),
        };
        1 << (at * KINDS + kind)
    }

    pub(super) fn has(self, letter: Letter) -> bool {
        self.0 & Self::bit(letter) != 0
    }

    pub(super) fn say(&mut self, letter: Letter) {
        self.0 |= Self::bit(letter);
    }
}
