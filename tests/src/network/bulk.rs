//! A transfer to the guest that goes on while it moves, compared at the end.
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::vm::{Vm, text};

/// Bytes sent at once, and how often.
const CHUNK: usize = 16 << 10;
const PAUSE: Duration = Duration::from_millis(100);
/// How long the connection may stand still.
const PATIENCE: Duration = Duration::from_secs(120);

/// Sends random bytes to the guest until it is told to stop.
#[derive(Debug)]
pub struct Bulk {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, String)>>,
}

impl Bulk {
    /// Starts a transfer to the guest in `vm`, which sums up what it gets.
    ///
    /// # Errors
    /// If there is no connection.
    pub fn start(vm: &mut Vm) -> Result<Self> {
        let peer = text("PEER_IP")?;
        let listener = TcpListener::bind((&*peer, 0)).context(|| "cannot listen".into())?;
        let port = listener.local_addr().context(|| "cannot listen".into())?.port();
        vm.says(&format!("(nc {peer} {port} | md5sum > /tmp/sum) >/dev/null 2>&1 &"))?;
        let (stream, _) = listener.accept().context(|| "the guest does not connect".into())?;
        let stop = Arc::<AtomicBool>::default();
        let stopped = stop.clone();
        let thread = Builder::new()
            .name("bulk".into())
            .spawn(move || send(stream, &stopped))
            .context(|| "cannot start a thread".into())?;
        Ok(Self { stop, thread })
    }

    /// Ends the transfer; gives how many bytes there were if the guest, in `vm` by now, got them
    /// all as they were sent.
    ///
    /// # Errors
    /// If the connection broke, or what arrived is not what was sent.
    pub fn finish(self, vm: &mut Vm) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.thread.join().map_err(|_| Error::Guest("the sender broke".into()))?;
        let (bytes, sum) = sent?;
        vm.until("[ -s /tmp/sum ]")?;
        let theirs = vm.says("cat /tmp/sum")?;
        if theirs.split_whitespace().next() == Some(&*sum) {
            Ok(bytes)
        } else {
            Err(Error::Guest(format!("of {bytes} bytes the guest got {theirs}, not {sum}")))
        }
    }
}

/// Sends until it is stopped, and sums up; then closes the connection.
fn send(mut stream: TcpStream, stop: &AtomicBool) -> Result<(u64, String)> {
    let what = || "cannot send to the guest".into();
    stream.set_write_timeout(Some(PATIENCE)).context(what)?;
    let mut sum = summing()?;
    let mut into = sum.stdin.take().expect("stdin is piped");
    let mut bytes = 0;
    let mut chunk = vec![0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        rustix::rand::getrandom(&mut chunk, rustix::rand::GetRandomFlags::empty()).context(what)?;
        stream.write_all(&chunk).context(what)?;
        into.write_all(&chunk).context(what)?;
        bytes += CHUNK as u64;
        thread::sleep(PAUSE);
    }
    drop((stream, into));
    let output = sum.wait_with_output().context(|| "cannot wait for md5sum".into())?;
    let sum = String::from_utf8_lossy(&output.stdout);
    Ok((bytes, sum.split_whitespace().next().unwrap_or_default().to_owned()))
}

fn summing() -> Result<Child> {
    let mut command = Command::new("md5sum");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    child.context(|| "cannot run md5sum".into())
}
