//! A direction of a connection that goes wrong once, and on.

use std::collections::VecDeque;
use std::thread;
use std::time::Duration;

use super::network::Break;

/// Does something wrong to what passes at one byte.
pub(super) struct Bend {
    /// How many bytes pass before it happens; none when it has.
    at: Option<usize>,
    how: Break,
    kept: Option<Vec<u8>>,
    /// What passed and was not yet read.
    pub(super) ready: VecDeque<u8>,
}

impl Bend {
    pub(super) fn new(at: usize, how: Break) -> Self {
        Self { at: Some(at), how, kept: None, ready: VecDeque::new() }
    }

    /// What becomes of `bytes`, piece by piece.
    pub(super) fn pass(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut bytes = bytes.to_vec();
        let left = match self.at {
            Some(at) if at < bytes.len() => at,
            at => {
                self.at = at.map(|at| at - bytes.len());
                return [Some(bytes), self.kept.take()].into_iter().flatten().collect();
            }
        };
        self.at = None;
        match self.how {
            Break::Flip => bytes[left] ^= 1 << (left % 8),
            Break::Twice => return vec![bytes.clone(), bytes],
            Break::Swap => {
                self.kept = Some(bytes);
                return Vec::new();
            }
            Break::Late => thread::sleep(Duration::from_millis(20)),
            Break::Shut | Break::Hole => unreachable!("a line does these itself"),
        }
        vec![bytes]
    }
}
