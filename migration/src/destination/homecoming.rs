//! After the arrival: the guest gets its assigned devices back, and the source hears of it.

use std::fmt;

use crate::wire::{Channel, Message, Stream};

/// Tells the source which devices serve the guest again; dropped, that there will be no more.
///
/// The source measures by it how long the guest was without them. Nothing else depends on it, so
/// nobody minds a source that does not listen.
pub struct Homecoming(Box<dyn FnMut(&Message) + Send>);

impl Homecoming {
    pub(super) fn over<S: Stream + 'static>(mut source: Channel<S>) -> Self {
        Self(Box::new(move |message| {
            let _unheard = source.send(message);
        }))
    }

    /// Where there is no source to tell.
    #[must_use]
    pub fn unheard() -> Self {
        Self(Box::new(|_| {}))
    }

    /// The device `id` serves the guest again.
    pub fn back(&mut self, id: &str) {
        tracing::debug!(id, "back");
        (self.0)(&Message::Back(id.to_owned()));
    }
}

impl Drop for Homecoming {
    fn drop(&mut self) {
        (self.0)(&Message::Settled);
    }
}

impl fmt::Debug for Homecoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Homecoming").finish_non_exhaustive()
    }
}
