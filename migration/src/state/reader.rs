//! Handing a state out to its owners.

use std::collections::BTreeMap;

use super::section::{Section, sections};
use super::{STATE_LIMIT, Saved, StateError};

/// How many sections an error names at most.
const LISTED: usize = 10;

/// Hands the sections of a state to whoever they belong to, each once and all of them.
#[derive(Debug)]
pub struct StateReader<'a> {
    /// By owner, then by kind; taken ones are gone.
    left: BTreeMap<&'a str, BTreeMap<&'a str, Section<'a>>>,
    instance: String,
}

impl<'a> StateReader<'a> {
    /// Checks the envelope of every section of `state`: lengths, checksums, no doubles.
    pub fn open(state: &'a [u8]) -> Result<Self, StateError> {
        if state.len() > STATE_LIMIT {
            let (size, limit) = (state.len(), STATE_LIMIT);
            return Err(StateError::TooLarge { what: "the machine".into(), size, limit });
        }
        let mut left: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for section in sections(state) {
            let section = section?;
            let Section { kind, instance, .. } = section;
            if left.entry(instance).or_default().insert(kind, section).is_some() {
                return Err(StateError::Twice { kind: kind.into(), instance: instance.into() });
            }
        }
        Ok(Self { left, instance: String::new() })
    }

    /// Names the owner of the sections that are taken next: `uart.load(from.at("pio/3f8"))?`.
    pub fn at(&mut self, instance: impl Into<String>) -> &mut Self {
        self.instance = instance.into();
        self
    }

    /// Takes the section of kind `T` of the current owner.
    pub fn take<T: Saved>(&mut self) -> Result<T, StateError> {
        let owned = self.left.get_mut(self.instance.as_str());
        let Some(section) = owned.and_then(|kinds| kinds.remove(T::KIND)) else {
            return Err(StateError::Missing { kind: T::KIND, instance: self.instance.clone() });
        };
        T::decode(section.version, section.payload).map_err(|source| StateError::At {
            instance: self.instance.clone(),
            source: Box::new(source),
        })
    }

    /// The kinds of the sections that were not taken yet.
    pub fn kinds(&self) -> impl Iterator<Item = &'a str> {
        self.left.values().flat_map(BTreeMap::keys).copied()
    }

    /// Insists that everything was taken.
    pub fn finish(self) -> Result<(), StateError> {
        let unread = self.left.values().flat_map(BTreeMap::values);
        let names = unread.map(|Section { kind, instance, .. }| format!("{instance} ({kind})"));
        let list = names.take(LISTED).collect::<Vec<_>>().join(", ");
        if list.is_empty() { Ok(()) } else { Err(StateError::Unread { list }) }
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::state::StateWriter;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct LampV1 {
        lit: bool,
        colour: u32,
    }

    impl Saved for LampV1 {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 1;
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct LampV2 {
        lit: bool,
        colour: u32,
        warm: bool,
    }

    impl Saved for LampV2 {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 2;
    }

    const RED: LampV1 = LampV1 { lit: true, colour: 0xff_0000 };
    const BLUE: LampV1 = LampV1 { lit: false, colour: 0xff };

    fn two_lamps() -> Vec<u8> {
        let mut out = StateWriter::new();
        out.at("pio/10").put(&RED).unwrap();
        out.at("pio/20").put(&BLUE).unwrap();
        out.into_bytes()
    }

    #[test]
    fn owners_of_the_same_kind_get_their_own() {
        let state = two_lamps();
        let mut from = StateReader::open(&state).unwrap();
        assert_eq!(from.at("pio/20").take::<LampV1>().unwrap(), BLUE);
        assert_eq!(from.at("pio/10").take::<LampV1>().unwrap(), RED);
        from.finish().unwrap();
    }

    #[test]
    fn what_nobody_took_is_an_error_that_names_it() {
        let state = two_lamps();
        let mut from = StateReader::open(&state).unwrap();
        from.at("pio/20").take::<LampV1>().unwrap();
        assert!(from.finish().unwrap_err().to_string().contains("pio/10 (lamp)"));
    }

    #[test]
    fn a_section_is_taken_once() {
        let state = two_lamps();
        let mut from = StateReader::open(&state).unwrap();
        from.at("pio/20").take::<LampV1>().unwrap();
        let again = from.take::<LampV1>();
        assert!(matches!(again, Err(StateError::Missing { kind: "lamp", .. })));
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let state = two_lamps();
        let mut from = StateReader::open(&state).unwrap();
        let error = from.at("pio/10").take::<LampV2>().unwrap_err();
        let StateError::At { instance, source } = error else { panic!("{error:?}") };
        assert_eq!(instance, "pio/10");
        assert!(matches!(*source, StateError::Version { kind: "lamp", found: 1, wanted: 2 }));
    }

    #[test]
    fn an_owner_holds_each_kind_once() {
        let mut out = StateWriter::new();
        out.at("pio/10").put(&RED).unwrap();
        assert!(matches!(out.put(&BLUE), Err(StateError::Twice { .. })));

        let mut doubled = two_lamps();
        doubled.extend(two_lamps());
        assert!(matches!(StateReader::open(&doubled), Err(StateError::Twice { .. })));
    }

    #[test]
    fn bytes_left_over_in_a_payload_are_refused() {
        let mut bytes = postcard::to_stdvec(&RED).unwrap();
        assert_eq!(LampV1::decode(1, &bytes).unwrap(), RED);
        bytes.push(0);
        assert!(matches!(LampV1::decode(1, &bytes), Err(StateError::Payload { .. })));
    }

    #[test]
    fn a_state_cut_anywhere_is_refused() {
        let state = two_lamps();
        let mut first = StateWriter::new();
        first.at("pio/10").put(&RED).unwrap();
        let boundary = first.bytes().len();
        for cut in (1..state.len()).filter(|&cut| cut != boundary) {
            assert!(StateReader::open(&state[..cut]).is_err(), "cut at {cut}");
        }
    }
}
