//! What honest peers say.

use migration::handover::Verdict;
use migration::ram::Run;
use migration::wire::{Codec, Frame, Hello, Message, Totals};
use vm_memory::GuestAddress;

use super::machines::{SIZE, offer};
use super::script::token;

/// All of a guest's memory, of which there is only to say that it is zero.
const ALL: Run = Run { start: GuestAddress(0), len: SIZE as u64 };

fn hello() -> Vec<u8> {
    Hello::OURS.encode().to_vec()
}

/// As the channel documents it.
fn message(message: &Message) -> Vec<u8> {
    let bytes = postcard::to_stdvec(message).expect("messages are plain data");
    let mut said = [&header(Frame::Message { len: bytes.len() })[..], &bytes].concat();
    said.extend(crc32fast::hash(&said).to_le_bytes());
    said
}

fn said(messages: &[Message]) -> Vec<u8> {
    messages.iter().flat_map(message).collect()
}

/// As the module of frames documents it.
fn header(frame: Frame) -> [u8; 16] {
    let (kind, flags, len, gpa) = match frame {
        Frame::Message { len } => (1u16, 0u16, len as u64, 0),
        Frame::Ram { run, checked, packed } => {
            let packed = packed.map_or(0, |codec| if codec == Codec::Lz4 { 2 } else { 4 });
            (2, packed | u16::from(checked), run.len, run.start.0)
        }
        Frame::Zero { run } => (3, 0, run.len / 4096, run.start.0),
        Frame::State { len } => (4, 0, len as u64, 0),
    };
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[4..8].copy_from_slice(&u32::try_from(len).expect("small").to_le_bytes());
    bytes[8..].copy_from_slice(&gpa.to_le_bytes());
    bytes
}

/// END, of a connection that carried these headers and `zero_pages`.
fn end(headers: &[u8], zero_pages: u64) -> Vec<u8> {
    let checksum = crc32fast::hash(headers);
    message(&Message::End(Totals { zero_pages, checksum, ..Totals::default() }))
}

fn offered(dry_run: bool, streams: u8) -> Vec<u8> {
    message(&Message::Offer { offer: offer(), dry_run, streams })
}

fn given() -> Vec<u8> {
    said(&[Message::Commit(token()), Message::Done(token())])
}

/// Memory that is zero and a state in which there is nothing.
fn whole() -> Vec<u8> {
    let headers = [header(Frame::Zero { run: ALL }), header(Frame::State { len: 0 })].concat();
    [offered(false, 1), headers.clone(), end(&headers, 4)].concat()
}

/// A part of memory, and no more.
fn piece(frame: Frame, content: &[u8]) -> Vec<u8> {
    let sum = crc32fast::hash(&[7; 4096]).to_le_bytes();
    let round_end = message(&Message::RoundEnd);
    [hello(), offered(false, 1), header(frame).to_vec(), content.to_vec(), sum.to_vec(), round_end]
        .concat()
}

/// Memory over two connections, of which the second carries all but a page.
fn over_two() -> Vec<u8> {
    let page = Run { len: 4096, ..ALL };
    let rest = Run { start: GuestAddress(4096), len: ALL.len - 4096 };
    let (first, state) = (header(Frame::Zero { run: page }), header(Frame::State { len: 0 }));
    let second = header(Frame::Zero { run: rest });
    let round_end = message(&Message::RoundEnd);
    let own = end(&[first, state].concat(), 1);
    let mut said = [hello(), offered(false, 2), first.to_vec(), round_end.clone()].concat();
    said.extend([state.to_vec(), own, given()].concat());
    let join = message(&Message::Join { token: token(), lane: 1 });
    said.extend([hello(), join, second.to_vec(), round_end, end(&second, 3)].concat());
    said
}

/// Memory that is passed as a file.
fn shared() -> Vec<u8> {
    let state = header(Frame::State { len: 0 });
    let share = message(&Message::Share);
    [hello(), share, offered(false, 1), state.to_vec(), end(&state, 0), given()].concat()
}

/// What sources say: questions, pieces of guests, and from the fifth on whole guests.
pub(super) fn from_a_source() -> Vec<Vec<u8>> {
    let page = Run { len: 4096, ..ALL };
    let plain = Frame::Ram { run: page, checked: true, packed: None };
    let packed = Frame::Ram { run: page, checked: true, packed: Some(Codec::Lz4) };
    let packed = piece(packed, &[&26_u32.to_le_bytes()[..], &sevens()].concat());
    let query = said(&[Message::Query(token()), Message::Done(token())]);
    let asking = [hello(), query].concat();
    let unheard = [hello(), whole(), message(&Message::Commit(token())), asking.clone()].concat();
    vec![
        [hello(), offered(true, 1)].concat(),
        asking,
        piece(plain, &[7; 4096]),
        packed,
        [hello(), whole(), given()].concat(),
        over_two(),
        shared(),
        unheard,
    ]
}

/// A page of sevens as a block of LZ4: one, 4090 times the byte before, and five more.
fn sevens() -> [u8; 26] {
    let mut block = [0xff; 26];
    block[..4].copy_from_slice(&[0x1f, 7, 1, 0]);
    block[19..].copy_from_slice(&[246, 0x50, 7, 7, 7, 7, 7]);
    block
}

/// What destinations say, to the end: from the third on they take the guest.
pub(super) fn from_a_destination() -> Vec<Vec<u8>> {
    use Message::{Accepted, Answer, Joined, Pass, Ready, RoundTaken, Running};
    let taken = [Accepted(token()), RoundTaken, Ready(token())];
    let with = |first: &[Message], last| [hello(), said(first), message(&last)].concat();
    let joined = [hello(), message(&Joined)].concat();
    let answer = [hello(), message(&Answer(Verdict::Running))].concat();
    vec![
        with(&[], Message::Mismatched(Vec::new())),
        with(&taken, Answer(Verdict::Refused)),
        with(&taken, Running(token())),
        [with(&taken, Running(token())), joined].concat(),
        with(&[Pass, Accepted(token()), Ready(token())], Running(token())),
        [with(&taken[..2], Ready(token())), answer].concat(),
        with(&[], Message::GaveUp("no".into())),
    ]
}

/// A guest as a file.
pub(super) fn snapshots() -> Vec<Vec<u8>> {
    vec![[hello(), whole()].concat()]
}
