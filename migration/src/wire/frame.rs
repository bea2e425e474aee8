//! The header before everything but the greeting, and the bounds of what follows it.
//!
//! ```text
//! kind u16 | flags u16 | len u32 | gpa u64      little endian, 16 bytes
//! ```

use vm_memory::GuestAddress;

use super::pack::Codec;
use crate::ram::{PAGE, Run};
use crate::state::STATE_LIMIT;

/// Size in bytes of a header.
pub(crate) const HEADER: usize = 16;
/// The largest payload of a frame of memory, in bytes.
pub const FRAME_LIMIT: u64 = 1 << 20;
/// The largest encoded message, in bytes.
pub const MESSAGE_LIMIT: usize = 1 << 20;

const MESSAGE: u16 = 1;
const RAM: u16 = 2;
const ZERO: u16 = 3;
const STATE: u16 = 4;
const CHECKED: u16 = 1;
const LZ4: u16 = 2;
const ZSTD: u16 = 4;

/// A header that makes sense, which promises what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// `len` bytes of postcard, and a CRC-32 of this header and them.
    Message {
        /// At most [`MESSAGE_LIMIT`].
        len: usize,
    },
    /// The content of whole pages, at most [`FRAME_LIMIT`] bytes.
    Ram {
        /// Where it belongs.
        run: Run,
        /// Whether a CRC-32 of the content follows it.
        checked: bool,
        /// How it is packed, if it is.
        packed: Option<Codec>,
    },
    /// Nothing follows: these pages are zero. On the wire `len` counts pages, not bytes.
    Zero {
        /// Which.
        run: Run,
    },
    /// `len` bytes of sections, at most [`STATE_LIMIT`].
    State {
        /// How many.
        len: usize,
    },
}

impl Frame {
    pub(crate) fn encode(self) -> [u8; HEADER] {
        let (kind, flags, len, gpa) = match self {
            Self::Message { len } => (MESSAGE, 0, len as u64, 0),
            Self::Ram { run, checked, packed } => {
                let packed = match packed {
                    None => 0,
                    Some(Codec::Lz4) => LZ4,
                    Some(Codec::Zstd) => ZSTD,
                };
                (RAM, packed | if checked { CHECKED } else { 0 }, run.len, run.start.0)
            }
            Self::Zero { run } => (ZERO, 0, run.len / PAGE, run.start.0),
            Self::State { len } => (STATE, 0, len as u64, 0),
        };
        let len = u32::try_from(len).expect("whoever makes a frame keeps its limits");
        let mut bytes = [0; HEADER];
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&u16::to_le_bytes(flags));
        bytes[4..8].copy_from_slice(&len.to_le_bytes());
        bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
        bytes
    }

    /// Makes sense of a header, or tells in words what it is not.
    pub(super) fn decode(bytes: [u8; HEADER]) -> Result<Self, String> {
        let [k0, k1, f0, f1, l0, l1, l2, l3, gpa @ ..] = bytes;
        let kind = u16::from_le_bytes([k0, k1]);
        let flags = u16::from_le_bytes([f0, f1]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let gpa = u64::from_le_bytes(gpa);
        let run = |len: u64| Run { start: GuestAddress(gpa), len };
        let sized = |limit: usize| {
            let len = len as usize;
            if gpa == 0 && len <= limit { Ok(len) } else { Err("a frame that is too large") }
        };
        let unknown = || format!("a frame of kind {kind} with unknown flags {flags:#x}");
        if kind != RAM && flags != 0 {
            return Err(unknown());
        }
        let frame = match kind {
            MESSAGE => Self::Message { len: sized(MESSAGE_LIMIT)? },
            RAM => Self::Ram {
                run: run(len.into()),
                checked: flags & CHECKED != 0,
                packed: match flags & !CHECKED {
                    0 => None,
                    LZ4 => Some(Codec::Lz4),
                    ZSTD => Some(Codec::Zstd),
                    _ => return Err(unknown()),
                },
            },
            ZERO => Self::Zero { run: run(u64::from(len) * PAGE) },
            STATE => Self::State { len: sized(STATE_LIMIT)? },
            _ => return Err(format!("a frame of the unknown kind {kind}")),
        };
        match frame {
            Self::Ram { run, .. } if run.len > FRAME_LIMIT => {
                Err(format!("{} bytes of memory in one frame", run.len))
            }
            Self::Ram { run, .. } | Self::Zero { run } if !run.is_sound() => {
                Err(format!("{} bytes of memory at {:#x}", run.len, run.start.0))
            }
            _ => Ok(frame),
        }
    }
}

impl Run {
    /// Whether it is made of at least one whole page and ends within the address space.
    fn is_sound(&self) -> bool {
        let whole =
            self.start.0.is_multiple_of(PAGE) && self.len.is_multiple_of(PAGE) && self.len != 0;
        whole && self.start.0.checked_add(self.len).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let run = |most: u64| {
            (0..1u64 << 40, 1..=most).prop_map(|(page, pages)| Run {
                start: GuestAddress(page * PAGE),
                len: pages * PAGE,
            })
        };
        prop_oneof![
            (0..=MESSAGE_LIMIT).prop_map(|len| Frame::Message { len }),
            (run(FRAME_LIMIT / PAGE), any::<bool>(), codecs())
                .prop_map(|(run, checked, packed)| Frame::Ram { run, checked, packed }),
            run(u32::MAX.into()).prop_map(|run| Frame::Zero { run }),
            (0..=STATE_LIMIT).prop_map(|len| Frame::State { len }),
        ]
    }

    fn codecs() -> impl Strategy<Value = Option<Codec>> {
        prop_oneof![Just(None), Just(Some(Codec::Lz4)), Just(Some(Codec::Zstd))]
    }

    #[test]
    fn the_layout_is_as_documented() {
        let run = Run { start: GuestAddress(0x0102_0304_0506_7000), len: 0x2000 };
        let bytes = Frame::Ram { run, checked: true, packed: None }.encode();
        let expected = [2, 0, 1, 0, 0, 0x20, 0, 0, 0, 0x70, 6, 5, 4, 3, 2, 1];
        assert_eq!(bytes, expected);
        let flags = |packed| Frame::Ram { run, checked: false, packed }.encode()[2];
        assert_eq!([Some(Codec::Lz4), Some(Codec::Zstd)].map(flags), [2, 4]);
        assert_eq!(Frame::Zero { run }.encode()[..8], [3, 0, 0, 0, 2, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn every_frame_survives_the_wire(frame in frames()) {
            prop_assert_eq!(Frame::decode(frame.encode()), Ok(frame));
        }

        #[test]
        fn a_header_that_decodes_keeps_every_bound(kind in 0..6u16, rest: [u8; 14]) {
            let mut bytes = [0; HEADER];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[2..].copy_from_slice(&rest);
            match Frame::decode(bytes) {
                Ok(Frame::Message { len }) => prop_assert!(len <= MESSAGE_LIMIT),
                Ok(Frame::State { len }) => prop_assert!(len <= STATE_LIMIT),
                Ok(Frame::Ram { run, .. }) => prop_assert!(run.is_sound() && run.len <= FRAME_LIMIT),
                Ok(Frame::Zero { run }) => prop_assert!(run.is_sound()),
                Err(_) => {}
            }
        }
    }
}
