//! The greeting: who we are and which versions we speak.
//!
//! ```text
//! "uvmm" 0x0d 0x0a 0x1a 0x00 | oldest u16 | newest u16 | zero u32      little endian, 16 bytes
//! ```
//!
//! It is frozen: it must tell any two builds, past and future, that they do not understand each
//! other. All else may change with the version.

/// The oldest and the newest version of the protocol that this build speaks.
///
/// 1 is the first; since 2 memory may come packed; since 3 what is shared may be in several files.
pub const VERSIONS: (u16, u16) = (1, 3);

/// Since which version memory may come packed.
pub(super) const PACKED_SINCE: u16 = 2;

/// Since which version memory that is shared may be in several files.
pub(super) const FILES_SINCE: u16 = 3;

pub(super) const SIZE: usize = 16;
const MAGIC: [u8; 8] = *b"uvmm\r\n\x1a\0";

/// The greeting of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest and the newest version it speaks.
    pub versions: (u16, u16),
}

impl Hello {
    /// Our own.
    pub const OURS: Self = Self { versions: VERSIONS };

    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.0.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.1.to_le_bytes());
        bytes
    }

    /// From bytes; none if they are no greeting. The last four mean nothing yet.
    #[must_use]
    pub fn decode(bytes: [u8; SIZE]) -> Option<Self> {
        let [.., o0, o1, n0, n1, _, _, _, _] = bytes;
        let versions = (u16::from_le_bytes([o0, o1]), u16::from_le_bytes([n0, n1]));
        (could_be(&bytes) && versions.0 <= versions.1).then_some(Self { versions })
    }

    /// The newest version that both sides speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.versions.1.min(other.versions.1);
        (newest >= self.versions.0.max(other.versions.0)).then_some(newest)
    }
}

/// Whether a greeting could start with `bytes`.
pub(super) fn could_be(bytes: &[u8]) -> bool {
    bytes.iter().zip(MAGIC).all(|(&byte, magic)| byte == magic)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_greeting_cannot_change_even_upon_version_bumps() {
        let bytes = Hello { versions: (0x0102, 0x0304) }.encode();
        assert_eq!(bytes, *b"uvmm\r\n\x1a\0\x02\x01\x04\x03\0\0\0\0");
        let future = *b"uvmm\r\n\x1a\0\x02\x00\xff\xff\x01\x02\x03\x04";
        assert_eq!(Hello::decode(future), Some(Hello { versions: (2, 0xffff) }));
    }

    #[test]
    fn this_build_says_which_versions_it_speaks() {
        assert_eq!(Hello::OURS.encode(), *b"uvmm\r\n\x1a\0\x01\x00\x03\x00\0\0\0\0");
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        let hello = |oldest, newest| Hello { versions: (oldest, newest) };
        assert_eq!(hello(1, 4).common(hello(3, 9)), Some(4));
        assert_eq!(hello(3, 9).common(hello(1, 4)), Some(4));
        assert_eq!(hello(1, 2).common(hello(3, 9)), None);
        assert_eq!(hello(3, 9).common(hello(1, 2)), None);
    }

    proptest! {
        #[test]
        fn only_greetings_decode(bytes: [u8; SIZE]) {
            prop_assert_eq!(Hello::decode(bytes), None); // 8 bytes of magic never come by chance
        }
    }
}
