//! Amounts of memory, as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes: `512M`, `5G`, `65536K`, or plain bytes such as `67108864`.
///
/// The suffixes are powers of 1024; `Mi`, `MiB` and `MB` mean the same as `M`, in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SizeError {
    /// It does not start with digits, or an unknown unit follows them.
    #[error("{0:?} is not a size: write a whole number and a unit, such as 512M or 5G")]
    Malformed(String),
    /// It does not fit into 64 bits.
    #[error("{0:?} is more bytes than any machine can address")]
    TooLarge(String),
}

const UNITS: [(&str, u32); 5] = [("T", 40), ("G", 30), ("M", 20), ("K", 10), ("", 0)];

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(digits_end);
        if digits.is_empty() {
            return Err(malformed());
        }
        let unit = unit.to_ascii_uppercase();
        let unit = unit.strip_suffix("IB").or(unit.strip_suffix(['I', 'B'])).unwrap_or(&unit);
        let (_, shift) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?;
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(too_large)
    }
}

/// Exact: the largest unit that divides the size without a rest.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let divides = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        let (unit, shift) =
            UNITS.iter().find(|(_, shift)| divides(*shift)).copied().unwrap_or(("", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl TryFrom<String> for Size {
    type Error = SizeError;

    fn try_from(text: String) -> Result<Self, SizeError> {
        text.parse()
    }
}

impl From<Size> for String {
    fn from(size: Size) -> String {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MiB", 512 << 20),
            ("512mb", 512 << 20),
            ("5G", 5 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "M", "-1M", "1.5G", "1 G", "5X", "5GG", "0x10", "5MM", "١M"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Malformed(text.into())), "{text}");
        }
        for text in ["16777216T", "99999999999999999999999"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.into())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_size_survives_being_written_and_read(bytes: u64) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }

        #[test]
        fn whole_units_survive_too(number in 0u64..1 << 20, shift in 0u32..5) {
            let size = Size(number << (shift * 10));
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<Size>();
        }
    }
}
