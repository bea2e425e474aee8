//! The name of a VM, which is also the name of its files.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most characters a name may have.
const LONGEST: usize = 64;

/// A name that is safe as a part of a file name: letters, digits, `.`, `_` and `-`, at most 64,
/// and no dot in front.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not a VM name: use 1 to 64 letters, digits, '.', '_' or '-', and no '.' in front"
)]
pub struct NameError(String);

impl VmName {
    /// `vm0`, `vm1`, …: the names of VMs that were given none.
    #[must_use]
    pub fn numbered(number: u32) -> Self {
        VmName(format!("vm{number}"))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let fits = (1..=LONGEST).contains(&text.len());
        if fits && text.bytes().all(allowed) && !text.starts_with('.') {
            Ok(VmName(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(2 * LONGEST).collect()))
        }
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for VmName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_name_leaves_the_directory(text in "[ -~]{0,70}") {
            if let Ok(name) = text.parse::<VmName>() {
                let path = std::path::Path::new("/dir").join(format!("{name}.sock"));
                prop_assert_eq!(path.parent(), Some(std::path::Path::new("/dir")));
            }
        }

        #[test]
        fn plain_names_are_names(text in "[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}") {
            let name: VmName = text.parse().unwrap();
            prop_assert_eq!(name.as_str(), text);
        }
    }

    #[test]
    fn hidden_long_empty_and_odd_names_are_refused() {
        for text in ["", ".", "..", ".a", "a/b", "a b", "ä", "a\n", &"a".repeat(65)] {
            assert!(text.parse::<VmName>().is_err(), "{text}");
        }
    }
}
