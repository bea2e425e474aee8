//! A file descriptor from one process to another, over a Unix socket (unix(7), `SCM_RIGHTS`).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The byte that a descriptor travels with.
const BYTE: u8 = b'm';

/// Passes `file`, with one byte; gives how many bytes went.
pub(super) fn pass(socket: BorrowedFd<'_>, file: &File) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    Ok(sendmsg(socket, &[IoSlice::new(&[BYTE])], &mut control, SendFlags::NOSIGNAL)?)
}

/// Takes one byte and what came with it, into `taken` if that is one file; gives how many bytes
/// came, 0 if the peer hung up.
pub(super) fn take(socket: BorrowedFd<'_>, taken: &mut Option<File>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let came = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    // Whatever is not wanted is closed here.
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let mut files: Vec<_> = files.flatten().collect();
    let alone = files.len() == 1 && !came.flags.contains(ReturnFlags::CTRUNC) && byte == [BYTE];
    *taken = files.pop().filter(|_| alone).map(File::from);
    Ok(came.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_arrives_as_another_descriptor_of_it() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"it").unwrap();
        assert_eq!(pass(here.as_fd(), &file).unwrap(), 1);
        drop(file);
        let mut taken = None;
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
        let (mut taken, mut text) = (taken.unwrap(), String::new());
        io::Seek::rewind(&mut taken).unwrap();
        taken.read_to_string(&mut text).unwrap();
        assert_eq!(text, "it");
    }

    #[test]
    fn a_byte_without_a_file_or_with_several_brings_none() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut taken = None;
        here.write_all(&[BYTE]).unwrap();
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
        assert!(taken.is_none());
        for count in [2, 3] {
            let file = tempfile::tempfile().unwrap();
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(3))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd(); 3];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files[..count])));
            let bytes = [IoSlice::new(&[BYTE])];
            sendmsg(&here, &bytes, &mut control, SendFlags::empty()).unwrap();
            assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 1);
            assert!(taken.is_none(), "{count} files");
        }
        drop(here);
        assert_eq!(take(there.as_fd(), &mut taken).unwrap(), 0);
    }
}
