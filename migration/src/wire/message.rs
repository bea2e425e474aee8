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
    /// Source, before OFFER, over a Unix socket: the memory itself can be had, as files.
    Share,
    /// Destination: pass them, with one byte.
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
    use std::collections::BTreeSet;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::compat::{Profile, Rule};
    use crate::state::decode_exact;
    use crate::wire::Frame;

    /// A guest with an item of each rule and of each kind of value.
    fn offer() -> Offer {
        let profile = Profile::new()
            .with("a", Rule::Eq, true)
            .with("b", Rule::AtLeast, 300)
            .with("c", Rule::Host, "d")
            .with("e", Rule::Subset, vec![3])
            .with("f", Rule::Subset, BTreeSet::from([0x10a]));
        Offer {
            name: "web".into(),
            config: vec![9, 8],
            profile,
            ram: vec![(0, 4096), (1 << 32, 8192)],
        }
    }

    /// Every message, with what it begins with on the wire.
    fn every_message() -> [(u8, Message); 20] {
        let token: Token = "00112233445566778899aabbccddeeff".parse().unwrap();
        [
            (0, Message::Offer { offer: offer(), dry_run: true, streams: 4 }),
            (1, Message::Accepted(token)),
            (2, Message::Mismatched(vec![])),
            (3, Message::RoundEnd),
            (4, Message::RoundTaken),
            (5, Message::End(Totals::default())),
            (6, Message::Ready(token)),
            (7, Message::Commit(token)),
            (8, Message::Running(token)),
            (9, Message::Done(token)),
            (10, Message::Query(token)),
            (11, Message::Answer(Verdict::Unknown)),
            (12, Message::GaveUp(String::new())),
            (13, Message::Join { token, lane: 1 }),
            (14, Message::Joined),
            (15, Message::Alive),
            (16, Message::Back(String::new())),
            (17, Message::Settled),
            (18, Message::Share),
            (19, Message::Pass),
        ]
    }

    #[test]
    fn as_many_pages_at_another_place_or_in_another_order_do_not_add_up_to_the_same() {
        let run = |page: u64| Run { start: GuestAddress(page * PAGE), len: PAGE };
        let ram = |run| Frame::Ram { run, checked: false, packed: None }.encode();
        let zero = |run| Frame::Zero { run }.encode();
        let sent = |first: u64, second: u64| {
            let [mut with_content, mut zeros] = [Totals::default(); 2];
            for run in [run(first), run(second)] {
                with_content.ram(run, ram(run));
                zeros.zero(run, zero(run));
            }
            [with_content, zeros]
        };
        for (one, other) in [((0, 1), (0, 2)), ((0, 1), (1, 0)), ((0, 1), (0, 0))] {
            let [one, other] = [one, other].map(|(first, second)| sent(first, second));
            assert!(one[0] != other[0] && one[1] != other[1]);
            assert_eq!((one[0].pages, one[1].zero_pages), (other[0].pages, other[1].zero_pages));
        }
    }

    #[test]
    fn messages_keep_their_numbers() {
        for (number, message) in every_message() {
            assert_eq!(postcard::to_stdvec(&message).unwrap()[0], number, "{}", message.name());
        }
        let mut next = [0; 200];
        next[0] = 20;
        let next = postcard::take_from_bytes::<Message>(&next);
        assert!(next.is_err(), "it is missing here: {next:?}");
    }

    #[test]
    fn messages_keep_their_layout() {
        let token = "00112233445566778899aabbccddeeff".parse().unwrap();
        let totals = Totals { pages: 1, zero_pages: 300, state_bytes: 2, checksum: 0x80 };
        let mismatch = Mismatch {
            path: "a".into(),
            wanted: "b".into(),
            found: "cc".into(),
            remedy: "d".into(),
        };
        let told: [(Message, &[u8]); 8] = [
            (
                Message::Offer { offer: offer(), dry_run: true, streams: 4 },
                b"\0\x03web\x02\x09\x08\x05\
                  \x01a\0\0\x01\
                  \x01b\x01\x01\xac\x02\
                  \x01c\x03\x02\x01d\
                  \x01e\x02\x03\x01\x03\
                  \x01f\x02\x04\x01\x8a\x02\
                  \x02\0\x80\x20\x80\x80\x80\x80\x10\x80\x40\
                  \x01\x04",
            ),
            (Message::Mismatched(vec![mismatch]), b"\x02\x01\x01a\x01b\x02cc\x01d"),
            (Message::End(totals), b"\x05\x01\xac\x02\x02\x80\x01"),
            (
                Message::Join { token, lane: 2 },
                b"\x0d\0\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff\x02",
            ),
            (Message::Answer(Verdict::Running), b"\x0b\0"),
            (Message::Answer(Verdict::Refused), b"\x0b\x01"),
            (Message::Answer(Verdict::Unknown), b"\x0b\x02"),
            (Message::Back("net0".into()), b"\x10\x04net0"),
        ];
        for (message, bytes) in told {
            assert_eq!(postcard::to_stdvec(&message).unwrap(), bytes, "{}", message.name());
            assert_eq!(decode_exact::<Message>(bytes).unwrap(), message);
        }
    }

    /// The rows of the table of messages in the rendered document.
    fn documented() -> BTreeSet<&'static str> {
        let page = include_str!("../../../docs/protocol.md");
        let (_, table) = page.split_once("## Messages").unwrap();
        let (table, _) = table.split_once("## Bytes").unwrap();
        let rows = table.lines().filter_map(|line| line.strip_prefix("| "));
        rows.filter_map(|row| row.split(" |").next()).filter(|name| *name != "name").collect()
    }

    #[test]
    fn the_page_about_the_protocol_has_every_message() {
        let messages = every_message();
        let names: BTreeSet<_> = messages.iter().map(|(_, message)| message.name()).collect();
        assert_eq!(documented(), names);
        let page = include_str!("../../../docs/protocol.md");
        let drawn = page.split("```mermaid").skip(1).filter_map(|rest| rest.split("```").next());
        let drawn = drawn.collect::<String>();
        for name in names.iter().filter(|name| **name != "GAVE UP") {
            assert!(drawn.contains(name), "{name} is in no diagram");
        }
        let known = |word: &&str| {
            let all = names.iter().flat_map(|name| name.split(' '));
            all.chain(["HELLO", "STATE"]).any(|known| known == *word)
        };
        let words = drawn.split(|c: char| !c.is_alphabetic());
        let shouted = words.filter(|word| word.len() > 2 && word.chars().all(char::is_uppercase));
        assert_eq!(shouted.filter(|word| !known(word)).collect::<Vec<_>>(), <[&str; 0]>::default());
    }
}
