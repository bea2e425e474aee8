//! One section as bytes.

use super::{SECTION_LIMIT, StateError};

const HEADER: usize = 8;
const CHECKSUM: usize = 4;

/// A section that borrows from the state it was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section<'a> {
    pub(super) kind: &'a str,
    pub(super) instance: &'a str,
    pub(super) version: u16,
    pub(super) payload: &'a [u8],
}

impl<'a> Section<'a> {
    /// Appends this section to `out`.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), StateError> {
        let too_large = |what: &str, size, limit| StateError::TooLarge {
            what: format!("{} ({}): its {what}", self.instance, self.kind),
            size,
            limit,
        };
        let name = |what, name: &str| {
            u8::try_from(name.len()).map_err(|_| too_large(what, name.len(), u8::MAX.into()))
        };
        let (kind, instance) = (name("kind", self.kind)?, name("instance", self.instance)?);
        let length = match u32::try_from(self.payload.len()) {
            Ok(length) if self.payload.len() <= SECTION_LIMIT => length,
            _ => return Err(too_large("payload", self.payload.len(), SECTION_LIMIT)),
        };
        let start = out.len();
        out.extend([kind, instance]);
        out.extend(self.version.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(self.kind.as_bytes());
        out.extend(self.instance.as_bytes());
        out.extend(self.payload);
        let checksum = crc32fast::hash(&out[start..]);
        out.extend(checksum.to_le_bytes());
        Ok(())
    }

    /// Reads the section that `bytes` starts with; gives it and what follows.
    ///
    /// `at` is where `bytes` starts within the state, for errors.
    pub(super) fn read(bytes: &'a [u8], at: usize) -> Result<(Self, &'a [u8]), StateError> {
        let damaged = |why| StateError::Damaged { at, why };
        let short = || damaged("it ends inside a section");
        let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or_else(short)?;
        let [kind, instance, v0, v1, l0, l1, l2, l3] = *header;
        let version = u16::from_le_bytes([v0, v1]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > SECTION_LIMIT {
            return Err(damaged("a section claims to be larger than any can be"));
        }
        let (kind, rest) = rest.split_at_checked(kind.into()).ok_or_else(short)?;
        let (instance, rest) = rest.split_at_checked(instance.into()).ok_or_else(short)?;
        let (payload, rest) = rest.split_at_checked(length).ok_or_else(short)?;
        let (checksum, rest) = rest.split_first_chunk::<CHECKSUM>().ok_or_else(short)?;
        let text = |bytes| str::from_utf8(bytes).map_err(|_| damaged("a name is not UTF-8"));
        let (kind, instance) = (text(kind)?, text(instance)?);
        let covered = bytes.len() - rest.len() - CHECKSUM;
        if crc32fast::hash(&bytes[..covered]) != u32::from_le_bytes(*checksum) {
            return Err(StateError::Checksum { kind: kind.into(), instance: instance.into() });
        }
        Ok((Self { kind, instance, version, payload }, rest))
    }
}

/// All sections of a state, in order.
pub(super) fn sections(state: &[u8]) -> impl Iterator<Item = Result<Section<'_>, StateError>> {
    let mut rest = state;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = state.len() - rest.len();
        let read = Section::read(rest, at);
        rest = read.as_ref().map_or(&[], |(_, rest)| rest);
        Some(read.map(|(section, _)| section))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_of(section: Section<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        section.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_layout_is_as_documented() {
        let section = Section { kind: "ab", instance: "c", version: 0x0102, payload: &[9, 8] };
        let bytes = bytes_of(section);
        assert_eq!(bytes[..13], [2, 1, 2, 1, 2, 0, 0, 0, b'a', b'b', b'c', 9, 8]);
        assert_eq!(bytes[13..], crc32fast::hash(&bytes[..13]).to_le_bytes());
    }

    #[test]
    fn a_name_too_long_is_refused_when_written() {
        let name = "x".repeat(256);
        let section = Section { kind: &name, instance: "", version: 1, payload: &[] };
        assert!(matches!(section.write(&mut Vec::new()), Err(StateError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            kind in "\\PC{0,40}",
            instance in "\\PC{0,40}",
            version: u16,
            payload in prop::collection::vec(any::<u8>(), 0..300),
            follows in prop::collection::vec(any::<u8>(), 0..30),
        ) {
            let section = Section { kind: &kind, instance: &instance, version, payload: &payload };
            let mut bytes = bytes_of(section);
            bytes.extend(&follows);
            let (read, rest) = Section::read(&bytes, 0).unwrap();
            prop_assert_eq!(read, section);
            prop_assert_eq!(rest, &follows[..]);
        }

        #[test]
        fn any_changed_bit_is_noticed(
            payload in prop::collection::vec(any::<u8>(), 0..100),
            at: prop::sample::Index,
            bit in 0..8u8,
        ) {
            let section = Section { kind: "kind", instance: "pio/3f8", version: 1, payload: &payload };
            let mut bytes = bytes_of(section);
            *at.get_mut(&mut bytes) ^= 1 << bit;
            prop_assert!(Section::read(&bytes, 0).is_err());
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
            prop_assert!(sections(&bytes).any(|section| section.is_err()));
        }
    }
}
