//! Guests whose memory goes from one process to another of the same host.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::typing::Typing;
use super::{Host, Vm, comes_to_run, usable};

/// How a frame of state begins on the wire, and a message of 17 bytes that is READY.
const STATE: [u8; 4] = [4, 0, 0, 0];
const READY: [u8; 17] = [1, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6];

fn start(host: &Host, name: &str, more: &str) -> (Vm, Typing) {
    let serial = host.path(&format!("{name}.serial"));
    let line = format!("run --name {name} --serial socket={} {more}", serial.display());
    let mut command = host.command(&line);
    if !more.contains("--incoming") {
        command.args(["--cmdline", "run=fill 5 60;rewrite 1 20"]);
    }
    let vm = host.start(command, name);
    (vm, Typing::to(&serial))
}

fn awaiting(host: &Host, name: &str) -> (Vm, Typing, String) {
    let at = format!("unix:{}", host.path(&format!("{name}.in")).display());
    let (vm, typing) = start(host, name, &format!("--incoming {at}"));
    (vm, typing, at)
}

#[test]
fn a_guest_goes_from_process_to_process_and_its_memory_stays() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let (mut here, mut to_here) = start(&host, "web", "--memory 64M");
    to_here.hear("rewrite ok");
    for (from, name) in [("web", "second"), ("second", "third")] {
        let (there, to_there, at) = awaiting(&host, name);
        let line = format!("migrate --vm {from} --to {at} --shared-memory --json");
        let (moved, report) = host.uvmm(&line);
        assert!(moved && report.contains("\"pages\":0"), "{report}");
        assert_eq!(here.ended(), Some(0));
        (here, to_here) = (there, to_there);
    }
    to_here.is_whole();
    assert!(host.has_forgotten());
}

#[test]
fn memory_is_not_shared_with_another_host() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let _web = host.run("--memory 64M");
    let (moved, said) = host.uvmm("migrate --vm web --to localhost:1 --shared-memory");
    assert!(!moved && said.contains("give --to unix:PATH") && said.lines().count() == 1, "{said}");
    assert!(comes_to_run(&host));
}

/// What somebody between the two sides sees of the memory.
#[derive(Default)]
struct Seen {
    memory: Option<File>,
    /// With the guest standing still, before the destination heard of its state.
    before: Option<Vec<u8>>,
    /// Once the destination has loaded that.
    after: Option<Vec<u8>>,
}

impl Seen {
    /// All that is in it now.
    fn content(&self) -> Option<Vec<u8>> {
        let file = self.memory.as_ref().unwrap();
        let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let mut bytes = vec![0; size];
        file.read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    /// The addresses at which somebody wrote.
    fn written(&self) -> Vec<String> {
        let (before, after) = (self.before.as_ref().unwrap(), self.after.as_ref().unwrap());
        assert_eq!(before.len(), after.len());
        let differ = (0..before.len()).filter(|&at| before[at] != after[at]);
        differ.map(|at| format!("{at:#x}: {:02x} {:02x}", before[at], after[at])).take(40).collect()
    }
}

/// Passes bytes and files on from `from` to `to`, up to READY: that ends it for both.
fn pass(from: &UnixStream, to: &UnixStream, seen: &Mutex<Seen>) {
    let mut bytes = vec![0; 1 << 16];
    loop {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut bytes)];
        let Ok(came) = recvmsg(from, into, &mut control, RecvFlags::CMSG_CLOEXEC) else { break };
        let messages = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let files: Vec<OwnedFd> = messages.flatten().collect();
        let bytes = &bytes[..came.bytes];
        let mut seen = seen.lock().unwrap();
        if bytes.starts_with(&STATE) {
            seen.before = seen.content();
        }
        if bytes.is_empty() || bytes.starts_with(&READY) {
            if !bytes.is_empty() {
                seen.after = seen.content();
            }
            break;
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let sent = sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        if sent != Ok(bytes.len()) {
            break;
        }
        if let Some(file) = files.into_iter().next() {
            seen.memory = Some(File::from(file));
        }
    }
    let _closed = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Lets one connection through to `to`, up to READY.
fn between(at: &Path, to: &Path) -> Arc<Mutex<Seen>> {
    let (listener, to) = (UnixListener::bind(at).unwrap(), to.to_owned());
    let seen = Arc::<Mutex<Seen>>::default();
    let watched = seen.clone();
    let serve = move || {
        let (near, far) = (listener.accept().unwrap().0, UnixStream::connect(to).unwrap());
        thread::scope(|threads| {
            let there = thread::Builder::new();
            there.spawn_scoped(threads, || pass(&near, &far, &watched)).unwrap();
            pass(&far, &near, &watched);
        });
    };
    thread::Builder::new().spawn(serve).unwrap();
    seen
}

#[test]
fn a_destination_that_loaded_everything_has_not_touched_memory_and_the_source_goes_on() {
    if !usable() {
        return;
    }
    let host = Host::new();
    let (_web, mut to_web) = start(&host, "web", "--memory 64M --cpus 2");
    to_web.hear("rewrite ok");
    let (there, ..) = awaiting(&host, "there");
    let seen = between(&host.path("between"), &host.path("there.in"));
    let at = host.path("between");
    let line = format!("migrate --vm web --to unix:{} --shared-memory --json", at.display());
    let (moved, report) = host.uvmm(&line);
    assert!(!moved && report.contains("\"failed\""), "{report}");
    let seen = seen.lock().unwrap();
    assert!(seen.before.is_some() && seen.after.is_some(), "{report}");
    assert_eq!(seen.written(), [""; 0], "somebody wrote to the memory");
    assert!(!host.uvmm("info --vm there --json").1.contains("\"running\""));
    assert!(comes_to_run(&host));
    drop(there);
    to_web.is_whole();
}
