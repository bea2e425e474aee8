//! File descriptors from one process to another, over a Unix socket (unix(7), `SCM_RIGHTS`).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::ram::MOST_FILES;

/// The byte that descriptors travel with.
const BYTE: u8 = b'm';

/// Passes `files`, at most [`MOST_FILES`], with one byte; gives how many bytes went.
pub(super) fn pass(socket: BorrowedFd<'_>, files: &[File]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = files.iter().map(File::as_fd).collect();
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(sendmsg(socket, &[IoSlice::new(&[BYTE])], &mut control, SendFlags::NOSIGNAL)?)
}

/// Takes one byte and the files that came with it, which are none if there were too many; gives how
/// many bytes came, 0 if the peer hung up.
pub(super) fn take(socket: BorrowedFd<'_>, taken: &mut Vec<File>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let came = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    // Whatever is not wanted is closed here.
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files: Vec<_> = files.flatten().map(File::from).collect();
    let cut = files.len() > MOST_FILES || came.flags.contains(ReturnFlags::CTRUNC);
    *taken = if cut || byte != [BYTE] { Vec::new() } else { files };
    Ok(came.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn files_arrive_in_order_as_other_descriptors_of_them() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = |text: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text).unwrap();
            file
        };
        assert_eq!(pass(here.as_fd(), &[file(b"one"), file(b"two")]).unwrap(), 1);
        let mut taken = Vec::new();
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
        let text = |mut file: File| {
            let mut text = String::new();
            io::Seek::rewind(&mut file).unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        };
        assert_eq!(taken.into_iter().map(text).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn a_byte_without_a_file_or_with_too_many_brings_none() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut taken = Vec::new();
        here.write_all(&[BYTE]).unwrap();
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
        assert!(taken.is_empty());
        for (count, arrive) in [(MOST_FILES, MOST_FILES), (MOST_FILES + 1, 0)] {
            let file = tempfile::tempfile().unwrap();
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FILES + 1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd(); MOST_FILES + 1];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files[..count])));
            let bytes = [IoSlice::new(&[BYTE])];
            sendmsg(&here, &bytes, &mut control, SendFlags::empty()).unwrap();
            assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
            assert_eq!(taken.len(), arrive, "of {count} files");
        }
        drop(here);
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 0);
    }
}
