//! Frames to pages. What a peer says about addresses is not trusted.

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::{PAGE_BYTES, Ram, Run};
use crate::wire::{Channel, PeerError, Stream};

type Slice<'a> = VolatileSlice<'a, BS<'a, vm_memory::bitmap::AtomicBitmap>>;

/// Reads the content of `run` into `ram`.
pub(crate) fn content<S: Stream>(
    peer: &mut Channel<S>,
    ram: &Ram,
    run: Run,
    checked: bool,
) -> Result<(), PeerError> {
    let memory = slice(peer, ram, run)?;
    peer.read_ram(&memory, checked)
}

/// Makes `run` of `ram` zero. Pages that nobody wrote to are: touching them would only cost.
pub(crate) fn zero<S: Stream>(peer: &Channel<S>, ram: &Ram, run: Run) -> Result<(), PeerError> {
    let memory = slice(peer, ram, run)?;
    for at in (0..memory.len()).step_by(PAGE_BYTES) {
        if memory.bitmap().dirty_at(at) {
            let page = memory.subslice(at, PAGE_BYTES).expect("a run is made of whole pages");
            page.copy_from(&[0; PAGE_BYTES]);
        }
    }
    Ok(())
}

fn slice<'a, S: Stream>(peer: &Channel<S>, ram: &'a Ram, run: Run) -> Result<Slice<'a>, PeerError> {
    let size = usize::try_from(run.len).ok();
    size.and_then(|size| ram.get_slice(run.start, size).ok()).ok_or_else(|| {
        peer.garbage(format!("{} bytes at {:#x}, where no memory is", run.len, run.start.0))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::patience::Cancel;
    use crate::ram::PAGE;

    #[test]
    fn a_page_that_became_zero_is_zeroed_and_no_other_is_touched() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let peer = Channel::new(stream, Duration::from_secs(1), Cancel::new()).unwrap();
        let ram = Ram::from_ranges(&[(GuestAddress(0), 3 * PAGE_BYTES)]).unwrap();
        ram.write_obj(u64::MAX, GuestAddress(2 * PAGE - 8)).unwrap();
        zero(&peer, &ram, Run { start: GuestAddress(0), len: 3 * PAGE }).unwrap();
        let mut all = [1; 3 * PAGE_BYTES];
        ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all == [0; 3 * PAGE_BYTES]);
        let memory = ram.get_slice(GuestAddress(0), 3 * PAGE_BYTES).unwrap();
        let written = [0, 1, 2].map(|page| memory.bitmap().dirty_at(page * PAGE_BYTES));
        assert_eq!(written, [false, true, false]);
    }
}
