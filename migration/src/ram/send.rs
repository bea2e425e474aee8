//! Pages to frames: long runs as large frames, zero pages as a word about them.

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{PAGE_BYTES, PageBitmap, Ram, Run};
use crate::wire::{Channel, FRAME_LIMIT, PeerError, Stream};

/// Most pages that are not zero show it here.
const GLANCE: usize = 64;

/// Sends `pages` of `ram`; with checksums if `checked`.
///
/// The guest may write meanwhile: what it writes must be in the dirty log collected next. Calls
/// `sent` after each stretch with its size in bytes in the guest and whether its content was sent.
pub(crate) fn send<S: Stream>(
    peer: &mut Channel<S>,
    ram: &Ram,
    pages: &PageBitmap,
    checked: bool,
    mut sent: impl FnMut(u64, bool),
) -> Result<(), PeerError> {
    for chunk in pages.runs().flat_map(chunks) {
        let size = usize::try_from(chunk.len).expect("a chunk is small");
        let memory = ram.get_slice(chunk.start, size).expect("a bitmap holds pages of its memory");
        for (first, past, zero) in stretches(&memory) {
            let run = Run {
                start: GuestAddress(chunk.start.0 + first as u64),
                len: (past - first) as u64,
            };
            if zero {
                peer.send_zero(run)?;
            } else {
                let content = memory.subslice(first, past - first).expect("within the chunk");
                peer.send_ram(run, &content, checked)?;
            }
            sent(run.len, !zero);
        }
    }
    peer.flush()
}

/// `run` in pieces that fit a frame.
fn chunks(run: Run) -> impl Iterator<Item = Run> {
    (0..run.len.div_ceil(FRAME_LIMIT)).map(move |index| {
        let offset = index * FRAME_LIMIT;
        Run { start: GuestAddress(run.start.0 + offset), len: FRAME_LIMIT.min(run.len - offset) }
    })
}

/// Divides `memory` where zero pages and others meet: first byte, past the last, whether zero.
fn stretches<B: BitmapSlice>(
    memory: &VolatileSlice<'_, B>,
) -> impl Iterator<Item = (usize, usize, bool)> {
    let zero_at = |at| (at < memory.len()).then(|| is_zero(memory, at));
    let (mut first, mut kind) = (0, zero_at(0));
    std::iter::from_fn(move || {
        let zero = kind?;
        let mut past = first;
        while kind == Some(zero) {
            past += PAGE_BYTES;
            kind = zero_at(past);
        }
        Some((std::mem::replace(&mut first, past), past, zero))
    })
}

/// Whether the page at `at` of `memory` is zero, at some time for each of its bytes.
fn is_zero<B: BitmapSlice>(memory: &VolatileSlice<'_, B>, at: usize) -> bool {
    static ZERO: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    let mut copy = [0; PAGE_BYTES];
    let page = memory.subslice(at, PAGE_BYTES).expect("memory comes in whole pages");
    page.copy_to(&mut copy[..GLANCE]);
    if copy[..GLANCE] != ZERO[..GLANCE] {
        return false;
    }
    page.copy_to(&mut copy[..]);
    copy == ZERO
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::ram::PAGE;

    fn divided(ram: &Ram) -> Vec<(usize, usize, bool)> {
        let memory = ram.get_slice(GuestAddress(0), 6 * PAGE_BYTES).unwrap();
        stretches(&memory).map(|(a, b, zero)| (a / PAGE_BYTES, b / PAGE_BYTES, zero)).collect()
    }

    #[test]
    fn memory_is_divided_where_zero_pages_meet_others() {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 6 * PAGE_BYTES)]).unwrap();
        assert_eq!(divided(&ram), [(0, 6, true)]);
        ram.write_obj(1u8, GuestAddress(2 * PAGE)).unwrap();
        ram.write_obj(1u8, GuestAddress(4 * PAGE - 1)).unwrap();
        assert_eq!(divided(&ram), [(0, 2, true), (2, 4, false), (4, 6, true)]);
        ram.write_obj(1u8, GuestAddress(PAGE / 2)).unwrap();
        ram.write_obj(1u8, GuestAddress(6 * PAGE - 1)).unwrap();
        let expected = [(0, 1, false), (1, 2, true), (2, 4, false), (4, 5, true), (5, 6, false)];
        assert_eq!(divided(&ram), expected);
    }

    #[test]
    fn a_run_is_cut_into_frames() {
        let run = Run { start: GuestAddress(PAGE), len: 2 * FRAME_LIMIT + PAGE };
        let lengths: Vec<_> = chunks(run).map(|run| run.len).collect();
        assert_eq!(lengths, [FRAME_LIMIT, FRAME_LIMIT, PAGE]);
        assert_eq!(chunks(run).last().unwrap().start.0, PAGE + 2 * FRAME_LIMIT);
    }
}
