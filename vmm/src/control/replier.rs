//! The VM's end of one conversation.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use serde::Serialize;

use super::message::Reply;

/// Answers one request.
///
/// No call waits for the client: one that does not read misses progress, and loses its
/// connection when even the end does not fit into what the socket buffers. A client that is
/// gone is not an error: whatever it asked for goes on. Dropping this closes the connection
/// without an answer, which tells the client that what came of its request is not known.
#[derive(Debug)]
pub struct Replier {
    stream: UnixStream,
    /// Counts the conversations that are open.
    _open: Arc<()>,
}

impl Replier {
    pub(super) fn new(stream: UnixStream, open: Arc<()>) -> Self {
        Replier { stream, _open: open }
    }

    /// Tells how far it is, if the client keeps up.
    pub fn progress(&mut self, progress: &impl Serialize) {
        // A Unix stream is writable while at most a quarter of its buffer is in use (Linux,
        // unix_writable()), which keeps the rest for the end.
        if self.events(PollFlags::OUT).contains(PollFlags::OUT) {
            self.write(&Reply::<_, ()>::Progress(progress));
        }
    }

    /// Ends the conversation with what came of the request: a result, or an error as
    /// [`crate::cause::chain`] writes it.
    pub fn finish<R: Serialize>(self, outcome: Result<R, String>) {
        self.write(&match outcome {
            Ok(result) => Reply::<(), _>::Result(result),
            Err(error) => Reply::Error(error),
        });
    }

    /// Whether nobody listens any more.
    #[must_use]
    pub fn client_is_gone(&self) -> bool {
        self.events(PollFlags::RDHUP).intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }

    fn events(&self, wanted: PollFlags) -> PollFlags {
        let mut fds = [PollFd::new(&self.stream, wanted)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(1) => fds[0].revents(),
            _ => PollFlags::empty(),
        }
    }

    fn write<P: Serialize, R: Serialize>(&self, reply: &Reply<P, R>) {
        let mut line = match serde_json::to_vec(reply) {
            Ok(line) => line,
            Err(error) => {
                tracing::error!("cannot write a reply on the control socket: {error}");
                br#"{"error":"the VM could not write its answer down: see its log"}"#.to_vec()
            }
        };
        line.push(b'\n');
        let sent = send(&self.stream, &line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if sent != Ok(line.len()) {
            // Half a line would be taken for something else.
            let _ = shutdown(&self.stream, Shutdown::Both);
        }
    }
}
