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
