//! From a socket into a file of memory, without a stop in this process.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// How much it holds at most; what an unprivileged process may ask for.
const SIZE: usize = 1 << 20;

/// The pipe that the kernel wants between the two.
///
/// Reading into fresh memory faults each page in, zeroes it, maps it, and then overwrites it.
/// Through here a page of the file is made from what came, and is mapped when the guest first
/// touches it.
pub(super) struct Conduit {
    inlet: OwnedFd,
    outlet: OwnedFd,
}

impl Conduit {
    pub(super) fn new() -> io::Result<Self> {
        let (outlet, inlet) = pipe_with(PipeFlags::CLOEXEC)?;
        if let Err(error) = fcntl_setpipe_size(&inlet, SIZE) {
            tracing::debug!(%error, "a pipe of the usual size carries memory");
        }
        Ok(Self { inlet, outlet })
    }

    /// Moves what there is at `socket`, at least a byte and at most as much as fills `memory`, to
    /// `offset` in `file`, which is what `memory` maps. Gives how much; 0 if the peer hung up.
    pub(super) fn carry<B: BitmapSlice>(
        &self,
        socket: BorrowedFd<'_>,
        (file, offset): (&File, u64),
        memory: &VolatileSlice<'_, B>,
    ) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE;
        let came = splice(socket, None, &self.inlet, None, memory.len(), flags)?;
        let mut done = 0;
        while done < came {
            let mut at = offset + done as u64;
            match splice(&self.outlet, None, file, Some(&mut at), came - done, flags) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(moved) => {
                    memory.bitmap().mark_dirty(done, moved);
                    done += moved;
                }
                Err(Errno::INTR) => {}
                // Not every file takes it: not one of huge pages. It is in the pipe, and must out.
                Err(_) => done += self.read(memory, done, came - done)?,
            }
        }
        Ok(came)
    }

    fn read<B: BitmapSlice>(
        &self,
        memory: &VolatileSlice<'_, B>,
        at: usize,
        len: usize,
    ) -> io::Result<usize> {
        let read = || -> Result<usize, VolatileMemoryError> {
            (&self.outlet).read_volatile(&mut memory.subslice(at, len)?)
        };
        match read() {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => Ok(read),
            Err(VolatileMemoryError::IOError(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use vm_memory::bitmap::Bitmap as _;
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::ram::Ram;

    const PAGE: usize = 4096;

    fn carried(seal: bool) {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("conduit", flags).unwrap());
        file.set_len(5 * PAGE as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), PAGE as u64);
        let ram = Ram::from_ranges_with_files([(GuestAddress(0), 4 * PAGE, Some(offset))]).unwrap();
        if seal {
            // What is mapped may be written, but the file takes nothing any more.
            fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        }
        let (mut here, there) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..=250).cycle().take(2 * PAGE).collect();
        here.write_all(&bytes).unwrap();
        drop(here);
        let (conduit, mut done) = (Conduit::new().unwrap(), 0);
        let memory = ram.get_slice(GuestAddress(PAGE as u64), 2 * PAGE).unwrap();
        while done < 2 * PAGE {
            let place = (&file, (2 * PAGE + done) as u64);
            let rest = memory.offset(done).unwrap();
            done += conduit.carry(there.as_fd(), place, &rest).unwrap();
        }
        assert_eq!(conduit.carry(there.as_fd(), (&file, 0), &memory).unwrap(), 0, "the end");
        let mut all = vec![0; 4 * PAGE];
        ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all[..PAGE] == [0; PAGE] && all[3 * PAGE..] == [0; PAGE]);
        assert!(all[PAGE..3 * PAGE] == bytes);
        let whole = ram.get_slice(GuestAddress(0), 4 * PAGE).unwrap();
        let written = [0, 1, 2, 3].map(|page| whole.bitmap().dirty_at(page * PAGE));
        assert_eq!(written, [false, true, true, false]);
    }

    #[test]
    fn bytes_arrive_in_the_memory_that_maps_the_file() {
        carried(false);
    }

    #[test]
    fn bytes_arrive_also_where_the_file_takes_none() {
        carried(true);
    }
}
