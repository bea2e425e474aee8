//! Bytes to the rest of the network and back, compared.
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::thread::Builder;

use crate::error::{Context, Error, Result};
use crate::vm::{Vm, text};

impl Vm {
    /// Sends random bytes, as many as `count` says, to the rest of the network and gets them back.
    ///
    /// # Errors
    /// If there is no way, or what comes back is not what was sent.
    pub fn exchanges(&mut self, count: usize) -> Result<()> {
        let peer = text("PEER_IP")?;
        let listener = TcpListener::bind((&*peer, 0)).context(|| "cannot listen".into())?;
        let port = listener.local_addr().context(|| "cannot listen".into())?.port();
        // If the guest never comes the thread waits until the test ends, and nobody for the thread.
        Builder::new()
            .name("exchange".into())
            .spawn(move || drop(send_back(&listener, count)))
            .context(|| "cannot start a thread".into())?;
        let compared = self.says(&format!(
            "head -c {count} /dev/urandom > /tmp/sent; nc {peer} {port} < /tmp/sent > /tmp/back; \
             cmp /tmp/sent /tmp/back && wc -c < /tmp/back"
        ))?;
        if compared == count.to_string() {
            Ok(())
        } else {
            Err(Error::Guest(format!("of {count} bytes the guest got {compared} back")))
        }
    }
}

fn send_back(listener: &TcpListener, count: usize) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut all = vec![0; count];
    stream.read_exact(&mut all)?;
    stream.write_all(&all)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}
