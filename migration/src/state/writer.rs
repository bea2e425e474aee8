//! Collecting a state.

use std::collections::BTreeSet;

use super::section::Section;
use super::{STATE_LIMIT, Saved, StateError};

/// Collects the sections of a state.
#[derive(Debug, Default)]
pub struct StateWriter {
    bytes: Vec<u8>,
    instance: String,
    written: BTreeSet<(String, &'static str)>,
}

impl StateWriter {
    /// A state of no sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the owner of the sections that follow: `uart.save(out.at("pio/3f8"))?`.
    pub fn at(&mut self, instance: impl Into<String>) -> &mut Self {
        self.instance = instance.into();
        self
    }

    /// Appends `value` as a section of the current owner, which may hold each kind once.
    pub fn put<T: Saved>(&mut self, value: &T) -> Result<(), StateError> {
        if !self.written.insert((self.instance.clone(), T::KIND)) {
            return Err(StateError::Twice {
                kind: T::KIND.into(),
                instance: self.instance.clone(),
            });
        }
        let payload = postcard::to_stdvec(value)
            .map_err(|source| StateError::Payload { kind: T::KIND, source })?;
        let (kind, instance) = (T::KIND, self.instance.as_str());
        let section = Section { kind, instance, version: T::VERSION, payload: &payload };
        section.write(&mut self.bytes)?;
        if self.bytes.len() > STATE_LIMIT {
            return Err(StateError::TooLarge {
                what: "the machine".into(),
                size: self.bytes.len(),
                limit: STATE_LIMIT,
            });
        }
        Ok(())
    }

    /// The state so far.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The state.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}
