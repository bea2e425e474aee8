//! The keys that mean uvmm and not the guest.

/// Starts an escape sequence: Ctrl-A.
const PREFIX: u8 = 0x01;

/// What the keys do, for whoever asks with Ctrl-A h.
pub const HELP: &str = "Ctrl-A x  ends the VM\n\
                        Ctrl-A a  sends Ctrl-A to the guest (so does Ctrl-A Ctrl-A)\n\
                        Ctrl-A h  shows this\n";

/// What a key means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    /// It is for the guest.
    Byte(u8),
    /// End the VM.
    Quit,
    /// Show [`HELP`].
    Help,
    /// Nothing, or nothing yet.
    Nothing,
}

/// Tells the keys for uvmm from those for the guest.
#[derive(Debug, Default)]
pub(super) struct Escape {
    prefixed: bool,
}

impl Escape {
    /// Takes the next byte that was typed.
    pub(super) fn key(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.prefixed) {
            self.prefixed = byte == PREFIX;
            return if self.prefixed { Key::Nothing } else { Key::Byte(byte) };
        }
        match byte {
            b'x' => Key::Quit,
            b'a' | PREFIX => Key::Byte(PREFIX),
            b'h' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(typed: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        let keys = typed.iter().map(|&byte| escape.key(byte));
        keys.filter(|&key| key != Key::Nothing).collect()
    }

    #[test]
    fn the_documented_keys_do_what_is_documented() {
        assert_eq!(keys(b"ax"), [Key::Byte(b'a'), Key::Byte(b'x')]);
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01a"), [Key::Byte(1)]);
        assert_eq!(keys(b"\x01\x01x"), [Key::Byte(1), Key::Byte(b'x')]);
        assert_eq!(keys(b"\x01h\x01?"), [Key::Help, Key::Help]);
        assert_eq!(keys(b"\x01zx"), [Key::Byte(b'x')]);
    }

    proptest! {
        #[test]
        fn without_the_prefix_every_byte_is_the_guests(typed in prop::collection::vec(2u8.., 0..99)) {
            let expected: Vec<_> = typed.iter().map(|&byte| Key::Byte(byte)).collect();
            prop_assert_eq!(keys(&typed), expected);
        }

        #[test]
        fn any_bytes_reach_the_guest_when_the_prefix_is_doubled(bytes: Vec<u8>) {
            let double = |&byte: &u8| if byte == PREFIX { vec![byte; 2] } else { vec![byte] };
            let typed: Vec<u8> = bytes.iter().flat_map(double).collect();
            let expected: Vec<_> = bytes.iter().map(|&byte| Key::Byte(byte)).collect();
            prop_assert_eq!(keys(&typed), expected);
        }
    }
}
