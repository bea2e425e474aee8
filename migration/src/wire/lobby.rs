//! Those who connected, until they have said what they want.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::{Channel, Listener, Message, PeerError, Stream};
use crate::patience::Cancel;

/// How many are listened to at once. If more come, whoever has said nothing for longest goes.
const MOST: usize = 16;
/// How often to look whether someone else came, while some are listened to.
const MOMENT: Duration = Duration::from_millis(5);

/// Greets whoever connects and hears what they want, each on a short thread of its own: whoever
/// says nothing is in nobody's way.
pub(crate) struct Lobby<'l, L: Listener> {
    listener: &'l L,
    /// How long each may take for a greeting, and for what comes then.
    limit: Duration,
    /// What the channels give up after that come of it, and at whose wish.
    silence: Duration,
    cancel: Cancel,
    /// Those who are listened to; the one that has been for longest is the first.
    visitors: VecDeque<Visitor>,
    tell: Sender<Said<L::Stream>>,
    told: Receiver<Said<L::Stream>>,
}

struct Visitor {
    sent_away: Cancel,
    thread: JoinHandle<()>,
}

/// Someone, and the first that they said.
pub(crate) type Said<S> = (Channel<S>, Message);

impl<'l, L: Listener> Lobby<'l, L>
where
    L::Stream: 'static,
{
    pub(crate) fn new(listener: &'l L, limit: Duration, silence: Duration, cancel: Cancel) -> Self {
        let (tell, told) = channel();
        Self { listener, limit, silence, cancel, visitors: VecDeque::new(), tell, told }
    }

    /// Waits at most `wait` for someone who has said what they want.
    pub(crate) fn next(&mut self, wait: Duration) -> io::Result<Option<Said<L::Stream>>> {
        self.visitors.retain(|visitor| !visitor.thread.is_finished());
        let is_empty = self.visitors.is_empty();
        if let Some(stream) = self.listener.accept(if is_empty { wait } else { Duration::ZERO })? {
            self.admit(stream);
        }
        Ok(self.told.recv_timeout(if is_empty { Duration::ZERO } else { wait.min(MOMENT) }).ok())
    }

    fn admit(&mut self, stream: L::Stream) {
        if self.visitors.len() == MOST
            && let Some(Visitor { sent_away, thread }) = self.visitors.pop_front()
        {
            sent_away.cancel();
            let _is_gone = thread.join(); // it heeds that at its next look up
        }
        let (sent_away, tell) = (Cancel::new(), self.tell.clone());
        let (limit, silence, cancel) = (self.limit, self.silence, self.cancel.clone());
        let heeds = cancel.or(&sent_away);
        let thread = Builder::new().name("visitor".into()).spawn(move || {
            match listen(stream, limit, silence, heeds) {
                Ok((mut peer, message)) => {
                    peer.set_cancel(cancel);
                    let _nobody_waits = tell.send((peer, message));
                }
                Err(error) => tracing::warn!(%error, "someone connected and wanted nothing"),
            }
        });
        match thread {
            Ok(thread) => self.visitors.push_back(Visitor { sent_away, thread }),
            Err(error) => tracing::warn!(%error, "no thread for someone who connected"),
        }
    }
}

fn listen<S: Stream>(
    stream: S,
    limit: Duration,
    silence: Duration,
    cancel: Cancel,
) -> Result<Said<S>, PeerError> {
    let mut peer = Channel::new(stream, silence, cancel)?;
    peer.answer_greeting(limit)?;
    peer.now("before it said what it wants");
    let message = peer.receive_message(limit)?;
    Ok((peer, message))
}

impl<L: Listener> Drop for Lobby<'_, L> {
    fn drop(&mut self) {
        self.visitors.iter().for_each(|visitor| visitor.sent_away.cancel());
    }
}
