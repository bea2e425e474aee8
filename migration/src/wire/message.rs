//! What the two sides say to each other.

use serde::{Deserialize, Serialize};

use super::frame::HEADER;
use crate::compat::{Mismatch, Offer};
use crate::handover::{Token, Verdict};
use crate::ram::{PAGE, Run};

/// What the two sides say to each other, besides memory and state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Source: this is the guest. A dry run ends with the answer.
    Offer {
        /// The guest.
        offer: Offer,
        /// Only asking.
        dry_run: bool,
        /// Over how many connections memory will flow, this one included.
        streams: u8,
    },
    /// Destination: the machine is built; the migration has this name from now on.
    Accepted(Token),
    /// Destination: all that stands against it.
    Mismatched(Vec<Mismatch>),
    /// Source: a pass over memory ends here.
    RoundEnd,
    /// Destination: and all of it arrived.
    RoundTaken,
    /// Source: everything was sent over this connection.
    End(Totals),
    /// Destination: everything is loaded, and nothing runs.
    Ready(Token),
    /// Source: the guest is yours.
    Commit(Token),
    /// Destination: it runs.
    Running(Token),
    /// Source: nobody will ask any more.
    Done(Token),
    /// Source, on a new connection: who has the guest?
    Query(Token),
    /// Destination: the answer to that.
    Answer(Verdict),
    /// Either: it ends here, and why.
    GaveUp(String),
    /// Source, on a new connection: memory of that migration will flow here too.
    Join {
        /// The migration.
        token: Token,
        /// Which of its connections this is, from 1 on.
        lane: u8,
    },
    /// Destination: let it flow.
    Joined,
    /// Source: nothing to tell; it waits for its guest.
    Alive,
    /// Destination: the assigned device of this name serves the guest again.
    Back(String),
    /// Destination: and that was the last.
    Settled,
    /// Source, before OFFER, over a Unix socket: the memory itself can be had as a file.
    Share,
    /// Destination: pass it, with one byte.
    Pass,
}

impl Message {
    /// Its name, for errors.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Offer { .. } => "OFFER",
            Self::Accepted(_) => "ACCEPTED",
            Self::Mismatched(_) => "MISMATCHED",
            Self::RoundEnd => "ROUND END",
            Self::RoundTaken => "ROUND TAKEN",
            Self::Alive => "ALIVE",
            Self::End(_) => "END",
            Self::Ready(_) => "READY",
            Self::Commit(_) => "COMMIT",
            Self::Running(_) => "RUNNING",
            Self::Done(_) => "DONE",
            Self::Back(_) => "BACK",
            Self::Settled => "SETTLED",
            Self::Share => "SHARE",
            Self::Pass => "PASS",
            Self::Query(_) => "QUERY",
            Self::Answer(_) => "ANSWER",
            Self::GaveUp(_) => "GAVE UP",
            Self::Join { .. } => "JOIN",
            Self::Joined => "JOINED",
        }
    }
}

/// All memory and state that went over a channel; both sides count, and compare at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Pages sent with their content; a page counts each time.
    pub pages: u64,
    /// Pages of which only was told that they are zero.
    pub zero_pages: u64,
    /// Bytes of state.
    pub state_bytes: u64,
    /// CRC-32 of all headers of memory and state, in order, and of the state.
    pub checksum: u32,
}

impl Totals {
    pub(super) fn ram(&mut self, run: Run, header: [u8; HEADER]) {
        self.pages += run.len / PAGE;
        self.sum(&header);
    }

    pub(super) fn zero(&mut self, run: Run, header: [u8; HEADER]) {
        self.zero_pages += run.len / PAGE;
        self.sum(&header);
    }

    pub(super) fn state(&mut self, state: &[u8], header: [u8; HEADER]) {
        self.state_bytes += state.len() as u64;
        self.sum(&header);
        self.sum(state);
    }

    fn sum(&mut self, bytes: &[u8]) {
        let mut sum = crc32fast::Hasher::new_with_initial(self.checksum);
        sum.update(bytes);
        self.checksum = sum.finalize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_numbers() {
        let token: Token = "00112233445566778899aabbccddeeff".parse().unwrap();
        let named: [(u8, Message); 17] = [
            (1, Message::Accepted(token)),
            (3, Message::RoundEnd),
            (4, Message::RoundTaken),
            (5, Message::End(Totals::default())),
            (6, Message::Ready(token)),
            (7, Message::Commit(token)),
            (8, Message::Running(token)),
            (9, Message::Done(token)),
            (10, Message::Query(token)),
            (12, Message::GaveUp(String::new())),
            (13, Message::Join { token, lane: 1 }),
            (14, Message::Joined),
            (15, Message::Alive),
            (16, Message::Back(String::new())),
            (17, Message::Settled),
            (18, Message::Share),
            (19, Message::Pass),
        ];
        for (number, message) in named {
            assert_eq!(postcard::to_stdvec(&message).unwrap()[0], number, "{}", message.name());
        }
        let answers = [Verdict::Running, Verdict::Refused, Verdict::Unknown].map(Message::Answer);
        let bytes = answers.map(|answer| postcard::to_stdvec(&answer).unwrap());
        assert_eq!(bytes, [[11, 0], [11, 1], [11, 2]]);
        let commit = postcard::to_stdvec(&Message::Commit(token)).unwrap();
        assert_eq!(commit[1..3], [0x00, 0x11], "a token is its bytes");
        assert_eq!(commit.len(), 17);
    }
}
