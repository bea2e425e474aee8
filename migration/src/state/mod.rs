//! What a device or a vCPU is, as bytes that another process can take over.
//!
//! A state is a list of sections. Each holds one [`Saved`] value under the kind of that value and
//! the address of its owner in the machine (`pio/3f8`, `vcpu/0`), with a version of its own:
//!
//! ```text
//! u8 kind length | u8 instance length | u16 version | u32 payload length
//! kind | instance | payload | u32 CRC-32 of all before
//! ```
//!
//! Numbers are little endian, payloads are postcard. The encoding is positional, so a field more
//! is a version more: [`Saved::decode`] is the place that knows how to read the older one, and
//! [`Saved::OLDEST`] tells everyone that it does. Both sides compare their [`Format`]s before
//! anything moves.

mod error;
pub(crate) mod format;
mod reader;
mod section;
pub mod testing;
mod writer;

pub use error::StateError;
pub use format::Format;
pub use reader::StateReader;
pub use writer::StateWriter;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest payload of one section, in bytes.
pub const SECTION_LIMIT: usize = 32 << 20;
/// The largest state of a whole machine, in bytes.
pub const STATE_LIMIT: usize = 64 << 20;

/// A saved format: plain data, apart from the type that runs, its name ending in its version.
pub trait Saved: Serialize + DeserializeOwned {
    /// Names the format for ever, at most 255 bytes: `uart16550`.
    const KIND: &'static str;
    /// Counts the layouts of this format, from 1.
    const VERSION: u16;
    /// The oldest version that `decode` reads; of those since then it reads all.
    const OLDEST: u16 = Self::VERSION;

    /// Makes a value of the bytes that `version` of this format encodes to.
    ///
    /// Reads this very version only; a type that can read an older one overrides this, and
    /// [`Saved::OLDEST`].
    fn decode(version: u16, bytes: &[u8]) -> Result<Self, StateError> {
        if version != Self::VERSION {
            return Err(StateError::Version {
                kind: Self::KIND,
                found: version,
                wanted: Self::VERSION,
            });
        }
        decode_exact(bytes).map_err(|source| StateError::Payload { kind: Self::KIND, source })
    }
}

/// Something that moves with the guest.
///
/// There are no default methods: what has nothing to save says so itself.
pub trait Migratable {
    /// Puts everything that the guest could tell apart into `out`.
    ///
    /// Called with all vCPUs and devices stopped. May not write guest memory: the last of it is
    /// already with the peer.
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError>;

    /// Becomes what `save` wrote.
    ///
    /// Called before the guest runs. What it reads is not trusted: it checks all of it before it
    /// changes anything, so that an error leaves it as it was.
    fn load(&self, from: &mut StateReader<'_>) -> Result<(), StateError>;
}

/// Decodes postcard `bytes` and insists that nothing is left over.
pub fn decode_exact<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    let (value, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(value) } else { Err(postcard::Error::DeserializeBadEncoding) }
}
