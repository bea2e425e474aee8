//! What goes over the connection: a frozen greeting, then frames.

mod channel;
mod choice;
mod conduit;
mod connect;
mod error;
mod frame;
mod hello;
mod lanes;
mod link;
mod lobby;
mod message;
mod pace;
mod pack;
mod passing;
mod stream;

pub use channel::Channel;
pub(crate) use channel::Received;
#[cfg(test)]
pub(crate) use channel::sum_of;
pub use connect::{connect_tcp, connect_unix};
pub use error::PeerError;
pub use frame::{FRAME_LIMIT, Frame, MESSAGE_LIMIT};
pub use hello::{Hello, VERSIONS};
pub use lanes::MOST_STREAMS;
pub(crate) use lanes::{Door, Lanes, culprit};
pub(crate) use lobby::{Lobby, Said};
pub use message::{Message, Totals};
pub(crate) use pace::Pace;
pub use pack::{Codec, Compression};
pub use stream::{Listener, Stream, listen_tcp};
