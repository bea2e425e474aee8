//! Memory made smaller for a wire that is slower than a processor.
//!
//! ```text
//! header (of what it unpacks to) | size u32 | that many bytes | checksum u32, if checked
//! ```
//!
//! Each frame is packed by itself, so what is unpacked is never larger than a frame. It came from
//! elsewhere and is not trusted: both unpackers write into a buffer of the size that the header
//! tells, and no further.

use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use zstd::bulk::{Compressor, Decompressor};

use super::FRAME_LIMIT;
use super::choice::Choice;

/// What memory is packed with on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Nothing: it goes straight from the guest to the socket.
    #[default]
    None,
    /// LZ4, for wires of a few hundred megabytes per second.
    Lz4,
    /// Zstandard at its fastest, for slower ones.
    Zstd,
    /// Whichever of these is the fastest, on each connection, found by trying.
    Auto,
}

impl Compression {
    /// The names of all, for command lines.
    pub const NAMES: [&'static str; 4] = ["none", "lz4", "zstd", "auto"];

    /// How each frame is packed.
    pub(super) fn choice(self) -> Choice {
        match self {
            Self::None => Choice::fixed(None),
            Self::Lz4 => Choice::fixed(Some(Codec::Lz4)),
            Self::Zstd => Choice::fixed(Some(Codec::Zstd)),
            Self::Auto => Choice::fastest(),
        }
    }

    /// The most of memory that goes as one frame.
    pub(crate) fn most(self) -> u64 {
        match self {
            Self::None => FRAME_LIMIT,
            Self::Lz4 | Self::Zstd | Self::Auto => PACKED_PART,
        }
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("{name:?} is not one of {}", Self::NAMES.join(", "))),
        }
    }
}

/// How a frame is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// A block of LZ4.
    Lz4,
    /// A frame of Zstandard.
    Zstd,
}

/// The most of memory that is packed as one: what keeps the buffers of many connections small, and
/// is enough to find what repeats.
const PACKED_PART: u64 = 256 << 10;
/// Of Zstandard's levels the fastest that is no special case.
const LEVEL: i32 = 1;

/// Packs and unpacks; keeps what that needs from one frame to the next.
#[derive(Default)]
pub(super) struct Packer {
    content: Vec<u8>,
    packed: Vec<u8>,
    zstd: Option<Compressor<'static>>,
    unzstd: Option<Decompressor<'static>>,
}

/// Memory as it was at one time for each of its bytes.
pub(super) struct Packed<'a> {
    pub(super) content: &'a [u8],
    /// The same made smaller; none if that is hardly worth it.
    pub(super) packed: Option<&'a [u8]>,
}

impl Packer {
    /// Packs what `slice` holds.
    pub(super) fn pack<B: BitmapSlice>(
        &mut self,
        codec: Codec,
        slice: &VolatileSlice<'_, B>,
    ) -> Packed<'_> {
        // The guest may be writing.
        self.content.resize(slice.len(), 0);
        slice.copy_to(&mut self.content[..]);
        let size = self.smaller(codec);
        Packed { content: &self.content, packed: size.map(|size| &self.packed[..size]) }
    }

    /// Packs the content, and gives the size if it is clearly smaller.
    fn smaller(&mut self, codec: Codec) -> Option<usize> {
        let len = self.content.len();
        let most = len - len / 16;
        let size = match codec {
            Codec::Lz4 => {
                let room = lz4_flex::block::get_maximum_output_size(len);
                self.packed.resize(self.packed.len().max(room), 0);
                lz4_flex::block::compress_into(&self.content, &mut self.packed).ok()?
            }
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Compressor::new(LEVEL).ok()?),
                };
                self.packed.resize(self.packed.len().max(most), 0);
                // What does not fit is not smaller.
                zstd.compress_to_buffer(&self.content, &mut self.packed[..most]).ok()?
            }
        };
        (size < most).then_some(size)
    }

    /// Room for `size` packed bytes.
    pub(super) fn room_for(&mut self, size: usize) -> &mut [u8] {
        self.packed.resize(self.packed.len().max(size), 0);
        &mut self.packed[..size]
    }

    /// Unpacks the `size` bytes for which there was room; none if they are not exactly `len` then.
    pub(super) fn unpack(&mut self, codec: Codec, size: usize, len: usize) -> Option<&[u8]> {
        let Self { content, packed, unzstd, .. } = self;
        content.resize(content.len().max(len), 0);
        let (packed, content) = (&packed[..size], &mut content[..len]);
        let unpacked = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, content).ok()?,
            Codec::Zstd => {
                let unzstd = match unzstd {
                    Some(unzstd) => unzstd,
                    none => none.insert(Decompressor::new().ok()?),
                };
                unzstd.decompress_to_buffer(packed, content).ok()?
            }
        };
        (unpacked == len).then_some(content)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOTH: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    fn text(len: usize) -> Vec<u8> {
        b"a guest's memory repeats itself, ".iter().copied().cycle().take(len).collect()
    }

    fn pack(packer: &mut Packer, codec: Codec, mut content: Vec<u8>) -> Option<Vec<u8>> {
        let packed = packer.pack(codec, &VolatileSlice::from(&mut content[..]));
        assert!(packed.content == content);
        packed.packed.map(<[u8]>::to_vec)
    }

    fn unpack<'a>(
        packer: &'a mut Packer,
        codec: Codec,
        packed: &[u8],
        len: usize,
    ) -> Option<&'a [u8]> {
        packer.room_for(packed.len()).copy_from_slice(packed);
        packer.unpack(codec, packed.len(), len)
    }

    #[test]
    fn what_repeats_becomes_smaller_and_comes_back() {
        let mut packer = Packer::default();
        for (codec, len) in BOTH.into_iter().flat_map(|codec| [(codec, 1 << 18), (codec, 4096)]) {
            let packed = pack(&mut packer, codec, text(len)).unwrap();
            assert!(packed.len() < len / 10, "{codec:?}: {}", packed.len());
            assert!(unpack(&mut packer, codec, &packed, len) == Some(&text(len)[..]));
        }
    }

    #[test]
    fn what_cannot_be_made_smaller_stays_as_it_is() {
        let mut state = 1_u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        });
        let noise = noise.take(1 << 16).collect::<Vec<_>>();
        for codec in BOTH {
            assert!(pack(&mut Packer::default(), codec, noise.clone()).is_none(), "{codec:?}");
        }
    }

    #[test]
    fn what_unpacks_to_another_size_is_refused() {
        let mut packer = Packer::default();
        for codec in BOTH {
            let packed = pack(&mut packer, codec, text(8192)).unwrap();
            for size in [0, 1, 4096, 8191, 8193, 1 << 20] {
                assert!(unpack(&mut packer, codec, &packed, size).is_none(), "{codec:?} {size}");
            }
            assert!(unpack(&mut packer, codec, &packed, 8192).is_some(), "and it goes on");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(junk: Vec<u8>, at: usize, bit in 0..8_u32) {
            let mut packer = Packer::default();
            for codec in BOTH {
                let whole = pack(&mut packer, codec, text(4096)).unwrap();
                let at = at % whole.len();
                let mut bent = whole.clone();
                bent[at] ^= 1_u8 << bit;
                for bytes in [&junk, &bent, &whole[..at].to_vec(), &[&whole[..at], &junk].concat()] {
                    if let Some(content) = unpack(&mut packer, codec, bytes, 4096) {
                        prop_assert_eq!(content.len(), 4096);
                    }
                }
            }
        }
    }
}
