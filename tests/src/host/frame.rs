//! What the lab and the agent in the lab host say to each other: frames on one byte stream.
//!
//! A frame is one byte of kind, four bytes of length (little endian) and the payload.
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Serialize};

/// The longest payload; a command line and its environment fit.
const LONGEST: usize = 16 << 20;
/// How much of a stream goes into one frame.
pub(crate) const CHUNK: usize = 64 << 10;

/// One message. `L` marks those of the lab, `H` those of the lab host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// H: the lab host is ready for commands; the environment it gives them.
    Ready(Vec<(Bytes, Bytes)>),
    /// L: run this command.
    Start(Start),
    /// L: input of the command; none at all is the end of it. Answers [`Frame::WantInput`].
    Input(Vec<u8>),
    /// H: the command took what it was given and can have at most [`CHUNK`] more.
    WantInput,
    /// H: the command wrote this on stdout.
    Stdout(Vec<u8>),
    /// H: the command wrote this on stderr.
    Stderr(Vec<u8>),
    /// L: nobody reads stdout any more.
    StdoutClosed,
    /// L: send the command this signal.
    Signal(i32),
    /// L: the terminal has this many rows and columns.
    Resize(u16, u16),
    /// H: the command ended with this status; 128 and more stand for signals as in a shell.
    Exit(i32),
    /// H: the command could not be started; the status a shell would give, and why.
    Refused(i32, String),
}

/// Bytes that need not be text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bytes(Vec<u8>);

impl From<OsString> for Bytes {
    fn from(string: OsString) -> Self {
        Self(string.into_vec())
    }
}

impl From<&Bytes> for OsString {
    fn from(bytes: &Bytes) -> Self {
        std::ffi::OsStr::from_bytes(&bytes.0).to_os_string()
    }
}

/// A command to run in the lab host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The program and its arguments.
    pub(crate) command: Vec<Bytes>,
    /// Variables to add to what the lab host sets itself.
    pub(crate) environment: Vec<(Bytes, Bytes)>,
    /// The working directory.
    pub(crate) directory: Bytes,
    /// Rows and columns, if the command shall have a terminal.
    pub(crate) terminal: Option<(u16, u16)>,
}

impl Frame {
    /// The frame as it is sent.
    #[must_use]
    pub(crate) fn encode(&self) -> Vec<u8> {
        let json = |value: serde_json::Result<Vec<u8>>| value.expect("plain data serializes");
        let (kind, payload) = match self {
            Self::Ready(environment) => (0, json(serde_json::to_vec(environment))),
            Self::Start(start) => (1, json(serde_json::to_vec(start))),
            Self::Input(bytes) => (2, bytes.clone()),
            Self::WantInput => (3, Vec::new()),
            Self::Stdout(bytes) => (4, bytes.clone()),
            Self::Stderr(bytes) => (5, bytes.clone()),
            Self::StdoutClosed => (6, Vec::new()),
            Self::Signal(number) => (7, number.to_le_bytes().to_vec()),
            Self::Resize(rows, columns) => {
                (8, [rows.to_le_bytes(), columns.to_le_bytes()].concat())
            }
            Self::Exit(status) => (9, status.to_le_bytes().to_vec()),
            Self::Refused(status, why) => (10, [&status.to_le_bytes(), why.as_bytes()].concat()),
        };
        let length = u32::try_from(payload.len()).expect("payloads are far smaller than 4 GiB");
        let mut bytes = Vec::with_capacity(payload.len() + 5);
        bytes.push(kind);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&payload);
        bytes
    }

    /// Takes the first frame off `bytes`, if it is there whole.
    ///
    /// # Errors
    /// If what is there is no frame.
    pub(crate) fn take(bytes: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let Some((header, rest)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
        let (kind, length) = parse_header(*header)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Self::decode(kind, payload)?;
        bytes.drain(..5 + length);
        Ok(Some(frame))
    }

    /// Waits for the next frame of `stream`.
    ///
    /// # Errors
    /// If the stream ends or what comes is no frame.
    pub(crate) fn receive(stream: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; 5];
        stream.read_exact(&mut header)?;
        let (kind, length) = parse_header(header)?;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        Self::decode(kind, &payload)
    }

    /// Sends the frame.
    ///
    /// # Errors
    /// As the stream reports them.
    pub(crate) fn send(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.encode())
    }

    fn decode(kind: u8, payload: &[u8]) -> io::Result<Self> {
        let number = || payload.try_into().map(i32::from_le_bytes).map_err(|_| invalid("a number"));
        Ok(match kind {
            0 => Self::Ready(serde_json::from_slice(payload)?),
            1 => Self::Start(serde_json::from_slice(payload)?),
            2 => Self::Input(payload.to_vec()),
            3 => Self::WantInput,
            4 => Self::Stdout(payload.to_vec()),
            5 => Self::Stderr(payload.to_vec()),
            6 => Self::StdoutClosed,
            7 => Self::Signal(number()?),
            8 => {
                let &[a, b, c, d] = payload else { return Err(invalid("a size")) };
                Self::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
            }
            9 => Self::Exit(number()?),
            10 => {
                let (status, why) =
                    payload.split_first_chunk().ok_or_else(|| invalid("a refusal"))?;
                Self::Refused(
                    i32::from_le_bytes(*status),
                    String::from_utf8_lossy(why).into_owned(),
                )
            }
            _ => return Err(invalid("a kind")),
        })
    }
}

fn parse_header([kind, length @ ..]: [u8; 5]) -> io::Result<(u8, usize)> {
    match usize::try_from(u32::from_le_bytes(length)) {
        Ok(length) if length <= LONGEST => Ok((kind, length)),
        _ => Err(invalid("a length")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} in a frame makes no sense"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_frame_arrives_as_it_was_sent_however_it_is_cut() {
        let text = |text: &str| Bytes::from(OsString::from(text));
        let frames = [
            Frame::Ready(vec![(text("PF0"), text("eth0"))]),
            Frame::Start(Start {
                command: vec![text("a b"), Bytes(vec![0xff, b'\n'])],
                environment: vec![],
                directory: text("/"),
                terminal: Some((24, 80)),
            }),
            Frame::Input(vec![]),
            Frame::WantInput,
            Frame::Stdout(vec![0, 1, 2]),
            Frame::Stderr(b"x".to_vec()),
            Frame::StdoutClosed,
            Frame::Signal(15),
            Frame::Resize(1, 2),
            Frame::Exit(-1),
            Frame::Refused(127, "no".into()),
        ];
        let mut received = Vec::new();
        let mut seen = Vec::new();
        for byte in frames.iter().flat_map(Frame::encode) {
            received.push(byte);
            seen.extend(Frame::take(&mut received).unwrap());
        }
        assert_eq!(seen, frames);
        assert!(received.is_empty());
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_waited_on_but_never_panics(mut bytes: Vec<u8>) {
            while let Ok(Some(_)) = Frame::take(&mut bytes) {}
            let _ = Frame::receive(&mut bytes.as_slice());
        }
    }
}
