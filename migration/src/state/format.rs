//! Which versions of a format are written and read.

use std::collections::BTreeSet;

use super::Saved;
use crate::compat::{Profile, Rule};

/// What the paths of formats begin with in a profile.
const PATH: &str = "state/";

/// A kind of section, the version of it that this build writes, and those that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    kind: &'static str,
    version: u16,
    oldest: u16,
}

impl Format {
    /// That of `T`.
    #[must_use]
    pub const fn of<T: Saved>() -> Self {
        Self { kind: T::KIND, version: T::VERSION, oldest: T::OLDEST }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Adds to `profile` that a state will have this, for the side that saves it.
    #[must_use]
    pub fn written(self, profile: Profile) -> Profile {
        self.item(profile, self.version)
    }

    /// Adds to `profile` that this can be read, for the side that loads it.
    #[must_use]
    pub fn read(self, profile: Profile) -> Profile {
        self.item(profile, self.oldest)
    }

    fn item(self, profile: Profile, from: u16) -> Profile {
        let versions: BTreeSet<u64> = (from..=self.version).map(u64::from).collect();
        profile.with(format!("{PATH}{}", self.kind), Rule::Subset, versions)
    }
}

/// What people call `version` at `path`, if formats are told of there.
pub(crate) fn name(path: &str, version: u64) -> Option<String> {
    path.starts_with(PATH).then(|| format!("version {version} of that format"))
}

/// What helps where the version at `path` cannot be read.
pub(crate) fn remedy(path: &str) -> Option<String> {
    let remedy = "use a uvmm at the destination that is as new as the source's";
    path.starts_with(PATH).then(|| remedy.to_owned())
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::compat::agree;
    use crate::state::{StateError, decode_exact};

    #[derive(Serialize, Deserialize)]
    struct Lamp<const VERSION: u16>(u8);

    impl Saved for Lamp<2> {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 2;
    }

    impl Saved for Lamp<3> {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 3;
        const OLDEST: u16 = 2;

        fn decode(_version: u16, bytes: &[u8]) -> Result<Self, StateError> {
            decode_exact(bytes).map_err(|source| StateError::Payload { kind: Self::KIND, source })
        }
    }

    #[test]
    fn a_build_reads_what_the_one_before_it_wrote_and_not_what_the_next_one_will() {
        let (old, new) = (Format::of::<Lamp<2>>(), Format::of::<Lamp<3>>());
        let fits = |writer: Format, reader: Format| {
            agree(&writer.written(Profile::new()), &reader.read(Profile::new()))
        };
        for (writer, reader) in [(old, old), (new, new), (old, new)] {
            fits(writer, reader).unwrap();
        }
        let told = &fits(new, old).unwrap_err()[0];
        assert_eq!(
            told.to_string(),
            "state/lamp: wanted version 3 of that format, found a host without it: use a uvmm at \
             the destination that is as new as the source's"
        );
        let none = agree(&new.written(Profile::new()), &Profile::new()).unwrap_err();
        assert!(none[0].remedy.contains("as new as"), "{}", none[0]);
        agree(&Profile::new(), &new.read(Profile::new())).expect("more can be read");
    }
}
