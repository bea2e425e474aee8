//! Greeting, frames and messages over a connection.

mod content;

use std::fs::File;
use std::time::{Duration, Instant};

use content::PART;

use super::choice::Choice;
use super::frame::HEADER;
use super::hello::{self, FILES_SINCE, PACKED_SINCE, could_be};
use super::link::Link;
use super::pack::Packer;
use super::{Codec, Frame, Hello, MESSAGE_LIMIT, Message, PeerError, Stream, Totals, VERSIONS};
use crate::patience::Cancel;
use crate::ram::{MOST_FILES, Run};
use crate::state::decode_exact;

/// The longest text that a peer may have printed here, in characters.
const WORDS: usize = 400;

/// Bytes of state per second that a peer keeps up, or it is given up.
const STATE_RATE: usize = 1 << 20;

/// A connection to a peer.
pub struct Channel<S> {
    link: Link<S>,
    /// Holds a part of memory still.
    scratch: Box<[u8]>,
    totals: Totals,
    /// What both sides speak, once they have greeted.
    version: u16,
    /// What memory is packed with.
    choice: Choice,
    packer: Packer,
    /// How many bytes packing has saved, and how long it took.
    saved: u64,
    packing: Duration,
}

/// What [`Channel::receive`] gives.
pub(crate) enum Received {
    Message(Message),
    Ram { run: Run, checked: bool, packed: Option<Codec> },
    Zero(Run),
    State(Vec<u8>),
}

impl<S: Stream> Channel<S> {
    /// A channel over `stream` that gives up after `silence` without a byte, or when cancelled.
    pub fn new(stream: S, silence: Duration, cancel: Cancel) -> Result<Self, PeerError> {
        let link = Link::new(stream, silence, cancel)?;
        Ok(Self {
            link,
            scratch: vec![0; PART].into(),
            totals: Totals::default(),
            version: VERSIONS.0,
            choice: Choice::fixed(None),
            packer: Packer::default(),
            saved: 0,
            packing: Duration::ZERO,
        })
    }

    /// Says what is going on from here, for errors: `while sending memory`.
    pub fn now(&mut self, during: &'static str) {
        self.link.during = during;
    }

    /// From here everything must be over at `deadline`, besides the bound on each silence.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.link.deadline = deadline;
    }

    /// From here only `cancel` counts.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.link.cancel = cancel;
    }

    /// Heeds a wish to stop.
    pub(crate) fn look_up(&self) -> Result<(), PeerError> {
        self.link.look_up()
    }

    /// All memory and state so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Bytes so far, in both directions.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.link.sent + self.link.received
    }

    /// Bytes per second that it carried while it was used, of memory as it was before it was packed;
    /// none if too few to tell.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        const TELLING: u64 = 1 << 20;
        let busy = (self.link.busy + self.packing).as_secs_f64();
        let bytes = self.bytes() + self.saved;
        (bytes >= TELLING && busy > 0.0).then(|| bytes as f64 / busy)
    }

    /// Greets first, and checks the answer.
    pub fn greet(&mut self, limit: Duration) -> Result<(), PeerError> {
        self.link.gather(&Hello::OURS.encode());
        match self.link.flush() {
            // Whoever hung up may have said who it is.
            Ok(()) | Err(PeerError::Closed { .. }) => self.greeted(limit),
            Err(error) => Err(error),
        }
    }

    /// Greets where nobody will answer.
    pub(crate) fn begin(&mut self) -> Result<(), PeerError> {
        self.link.gather(&Hello::OURS.encode());
        self.link.flush()
    }

    /// Waits for a greeting and answers it.
    pub fn answer_greeting(&mut self, limit: Duration) -> Result<(), PeerError> {
        let understood = self.greeted(limit);
        if matches!(understood, Ok(()) | Err(PeerError::Version { .. })) {
            self.link.gather(&Hello::OURS.encode());
            self.link.flush()?;
        }
        understood
    }

    /// Waits for a greeting, and does not answer it.
    pub(crate) fn greeted(&mut self, limit: Duration) -> Result<(), PeerError> {
        let until = Instant::now() + limit;
        while self.link.ahead().len() < hello::SIZE && could_be(self.link.ahead()) {
            match self.link.fill(until) {
                Err(PeerError::Closed { .. }) if !self.link.ahead().is_empty() => break,
                filled => filled?,
            }
        }
        let first = self.link.take(hello::SIZE);
        let Some(theirs) = first.first_chunk().copied().and_then(Hello::decode) else {
            let first = first.escape_ascii().to_string();
            return Err(PeerError::NotUvmm { peer: self.link.peer.clone(), first });
        };
        match Hello::OURS.common(theirs) {
            Some(version) => {
                self.version = version;
                Ok(())
            }
            None => Err(PeerError::Version {
                peer: self.link.peer.clone(),
                theirs: theirs.versions,
                ours: VERSIONS,
            }),
        }
    }

    /// Sends a message, and all that was gathered before it.
    pub fn send(&mut self, message: &Message) -> Result<(), PeerError> {
        let bytes = postcard::to_stdvec(message).expect("messages are plain data");
        if bytes.len() > MESSAGE_LIMIT {
            return Err(PeerError::TooLarge { size: bytes.len(), limit: MESSAGE_LIMIT });
        }
        let header = Frame::Message { len: bytes.len() }.encode();
        self.link.gather(&header);
        self.link.gather(&bytes);
        self.link.gather(&sum_of(&header, &bytes));
        self.link.flush()
    }

    /// Tells, without believing in it, that it ends here and why.
    pub fn give_up(&mut self, why: &str) {
        let bound = Instant::now() + Duration::from_secs(1);
        self.link.deadline = Some(self.link.deadline.map_or(bound, |given| given.min(bound)));
        self.link.cancel = Cancel::new();
        self.link.forget();
        let why = why.chars().take(WORDS).collect();
        if let Err(error) = self.send(&Message::GaveUp(why)) {
            tracing::debug!(%error, "the peer will not learn why");
        }
    }

    /// What the peer said before it hung up, if it said why; else `error`.
    pub fn last_words(&mut self, error: PeerError) -> PeerError {
        const MOMENT: Duration = Duration::from_millis(200);
        if matches!(error, PeerError::GaveUp { .. }) {
            return error;
        }
        self.link.deadline = Some(Instant::now() + MOMENT);
        self.link.cancel = Cancel::new();
        loop {
            match self.receive_message(MOMENT) {
                Ok(_) => {}
                Err(said @ PeerError::GaveUp { .. }) => return said,
                Err(_) => return error,
            }
        }
    }

    /// Tells that the pages of `run` are zero.
    pub(crate) fn send_zero(&mut self, run: Run) -> Result<(), PeerError> {
        let header = Frame::Zero { run }.encode();
        self.totals.zero(run, header);
        self.link.gather(&header);
        self.link.flush_much()
    }

    /// Sends all that was gathered; more memory may come much later.
    pub(crate) fn flush(&mut self) -> Result<(), PeerError> {
        self.choice.rest();
        self.link.flush()
    }

    /// Sends the state.
    pub(crate) fn send_state(&mut self, state: &[u8]) -> Result<(), PeerError> {
        let header = Frame::State { len: state.len() }.encode();
        self.totals.state(state, header);
        self.link.gather(&header);
        self.link.flush()?;
        self.link.write_all(state)
    }

    /// Waits at most `limit` for the first byte of what comes next: tells whether it came.
    pub(crate) fn comes(&mut self, limit: Duration) -> Result<bool, PeerError> {
        match self.link.peek(Instant::now() + limit) {
            Ok(()) => Ok(true),
            Err(PeerError::Stalled { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits at most `limit` for what comes next. The content of memory is for the caller to read.
    pub(crate) fn receive(&mut self, limit: Duration) -> Result<Received, PeerError> {
        let until = Instant::now() + limit;
        let mut header = [0; HEADER];
        self.link.read_exact(&mut header, Some(until))?;
        match Frame::decode(header).map_err(|what| self.garbage(what))? {
            Frame::Ram { packed: Some(_), .. } if self.version < PACKED_SINCE => {
                Err(self.garbage("packed memory, which was not agreed on".into()))
            }
            Frame::Ram { run, checked, packed } => {
                self.totals.ram(run, header);
                Ok(Received::Ram { run, checked, packed })
            }
            Frame::Zero { run } => {
                self.totals.zero(run, header);
                Ok(Received::Zero(run))
            }
            Frame::State { len } => {
                let state = self.read_state(len)?;
                self.totals.state(&state, header);
                Ok(Received::State(state))
            }
            Frame::Message { len } => {
                let bytes = self.link.read_vec(len, Some(until))?;
                let mut sum = [0; 4];
                self.link.read_exact(&mut sum, Some(until))?;
                if sum != sum_of(&header, &bytes) {
                    return Err(self.garbage("a message with a wrong checksum".into()));
                }
                match decode_exact(&bytes) {
                    Ok(Message::GaveUp(why)) => Err(self.gave_up(&why)),
                    Ok(message) => Ok(Received::Message(message)),
                    Err(_) => Err(self.garbage("a message that does not decode".into())),
                }
            }
        }
    }

    /// Reads the state: every byte before the silence gets too long, and all of it in the time
    /// that [`STATE_RATE`] takes besides.
    fn read_state(&mut self, len: usize) -> Result<Vec<u8>, PeerError> {
        let given = self.link.deadline;
        let (start, limit) = (
            Instant::now(),
            self.link.silence + Duration::from_secs((len / STATE_RATE) as u64 + 1),
        );
        let due = start + limit;
        self.link.deadline = Some(given.map_or(due, |given| given.min(due)));
        let state = self.link.read_vec(len, None);
        self.link.deadline = given;
        state.map_err(|error| match error {
            PeerError::Stalled { .. } if Instant::now() >= due => {
                self.slow("the state", start.elapsed())
            }
            error => error,
        })
    }

    /// Waits at most `limit` for a message.
    pub fn receive_message(&mut self, limit: Duration) -> Result<Message, PeerError> {
        match self.receive(limit)? {
            Received::Message(message) => Ok(message),
            Received::Ram { .. } | Received::Zero(_) => Err(self.garbage("memory".into())),
            Received::State(_) => Err(self.garbage("state".into())),
        }
    }

    /// Whether files can be passed over it.
    pub(crate) fn is_local(&self) -> bool {
        self.link.is_local()
    }

    /// Passes `files` to a peer that said PASS.
    pub(crate) fn pass_files(&mut self, files: &[File]) -> Result<(), PeerError> {
        self.link.pass_files(files)
    }

    /// How many files the peer takes as one memory.
    pub(crate) fn most_files(&self) -> usize {
        if self.version < FILES_SINCE { 1 } else { MOST_FILES }
    }

    /// Says PASS, and takes the files that the peer passes within `limit`.
    pub(crate) fn take_files(&mut self, limit: Duration) -> Result<Vec<File>, PeerError> {
        self.send(&Message::Pass)?;
        let files = self.link.take_files(Instant::now() + limit)?;
        if (1..=self.most_files()).contains(&files.len()) {
            Ok(files)
        } else {
            Err(self.garbage("no memory, or too many files".into()))
        }
    }

    /// An error for something that did not come for `after`.
    #[must_use]
    pub fn stalled(&self, after: Duration) -> PeerError {
        PeerError::Stalled { peer: self.link.peer.clone(), during: self.link.during, after }
    }

    /// An error for `what` did not come to its end for `after`.
    pub(crate) fn slow(&self, what: &'static str, after: Duration) -> PeerError {
        let (peer, during) = (self.link.peer.clone(), self.link.during);
        PeerError::Slow { peer, during, what, after }
    }

    /// An error for a message that does not belong here.
    #[must_use]
    pub fn unexpected(&self, message: &Message) -> PeerError {
        self.garbage(format!("an unexpected {}", message.name()))
    }

    /// An error for something that no uvmm sends.
    #[must_use]
    pub fn garbage(&self, what: String) -> PeerError {
        PeerError::Garbage { peer: self.link.peer.clone(), during: self.link.during, what }
    }

    fn gave_up(&self, why: &str) -> PeerError {
        let why = why.chars().take(WORDS).flat_map(char::escape_debug).collect();
        PeerError::GaveUp { peer: self.link.peer.clone(), during: self.link.during, why }
    }
}

/// The checksum behind a message: one wrong bit could say that the guest runs where it does not.
pub(crate) fn sum_of(header: &[u8; HEADER], bytes: &[u8]) -> [u8; 4] {
    let mut sum = crc32fast::Hasher::new();
    sum.update(header);
    sum.update(bytes);
    sum.finalize().to_le_bytes()
}
