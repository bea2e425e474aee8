//! KVM's structures as bytes of exactly their size, for `#[serde(with = "exact")]`.
//!
//! The structures' own serde form fills up with zeros what is short; a state from a peer that is
//! short is a broken one.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) fn serialize<T, S>(value: &T, to: S) -> Result<S::Ok, S::Error>
where
    T: IntoBytes + Immutable,
    S: Serializer,
{
    to.serialize_bytes(value.as_bytes())
}

pub(crate) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
where
    T: FromBytes,
    D: Deserializer<'de>,
{
    let bytes = <&[u8]>::deserialize(from)?;
    T::read_from_bytes(bytes).map_err(|_| D::Error::invalid_length(bytes.len(), &"its exact size"))
}
