//! Pages to frames: long runs as large frames, zero pages as a word about them.
//!
//! Each region of memory is a queue of pages, in order of address. The connections begin in
//! different regions, because a file lets in one writer at a time and each region may be a file of
//! its own where they arrive; whoever is done helps the others, so that each always has something
//! to send and none more than it can. A queue has the dirty sources forget a window of pages when
//! the first of them is taken: what is written after that is for the next pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, scope};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::holes::Holes;
use super::{DirtySet, PAGE, PAGE_BYTES, PORTION, PageBitmap, Ram, Run, Window};
use crate::error::Error;
use crate::patience::Cancel;
use crate::wire::{Channel, FRAME_LIMIT, Lanes, Pace, PeerError, Stream, culprit};

/// How much of a page is looked at in one go.
const GLANCE: usize = 512;
/// The most pieces that are taken from the queue at once.
const PIECES: usize = 64;
/// Pages that are forgotten in one go. Each window may cost a call into the kernel that interrupts
/// all vCPUs; and what is written between that call and the sending is sent twice.
const WINDOW: usize = (PORTION / PAGE) as usize;

/// A pass over memory.
pub(crate) struct Pass<'a> {
    pub(crate) ram: &'a Ram,
    /// The guest may write them meanwhile: what it writes must be in the dirty log collected next.
    pub(crate) pages: &'a PageBitmap,
    /// Whether there may be pages among them that were never touched: what was written was.
    pub(crate) untouched: bool,
    /// Whether checksums go with them.
    pub(crate) checked: bool,
    /// The most to send as one frame.
    pub(crate) most: u64,
    pub(crate) pace: &'a Mutex<Pace>,
    pub(crate) cancel: &'a Cancel,
}

/// How far a pass is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// Bytes in the guest.
    pub(crate) pages: u64,
    /// Bytes on the wire for the content of those that have one.
    pub(crate) content: u64,
}

/// What the connections share.
struct Shared<'a, I> {
    pass: &'a Pass<'a>,
    /// What is left of each region.
    queues: Vec<Mutex<I>>,
    pages: AtomicU64,
    content: AtomicU64,
    broken: Cancel,
}

/// Sends a pass over `peer` and as many of `lanes` as it is worth; `dirty` forgets its pages just
/// before they are read. Calls `told` now and then.
pub(crate) fn send<S: Stream>(
    peer: &mut Channel<S>,
    lanes: &mut Lanes<S>,
    pass: &Pass<'_>,
    dirty: &mut DirtySet,
    mut told: impl FnMut(Sent),
) -> Result<(), Error> {
    let mut unknown = None;
    let forget = Mutex::new(|window: &Window<'_>| {
        unknown.is_none() && dirty.forget(window).map_err(|error| unknown = Some(error)).is_ok()
    });
    let streams = 1 + lanes.iter_mut().len();
    let most = lock(pass.pace)
        .fair_share(streams as u64)
        .map_or(pass.most, |share| (share / PAGE * PAGE).clamp(PAGE, pass.most));
    let shared = Shared {
        pass,
        queues: queues(pass, most, &forget).map(Mutex::new).collect(),
        pages: AtomicU64::new(0),
        content: AtomicU64::new(0),
        broken: lanes.broken.clone(),
    };
    let helpers = usize::try_from(pass.pages.count() * PAGE / most).unwrap_or(usize::MAX);
    scope(|threads| {
        let mut working = Vec::new();
        for (lane, number) in lanes.iter_mut().take(helpers).zip(1..) {
            let (thread, shared) = (Builder::new().name("lane".into()), &shared);
            let first = number * shared.queues.len() / streams;
            match thread.spawn_scoped(threads, move || shared.work(lane, first, |_| {})) {
                Ok(thread) => working.push(thread),
                Err(error) => tracing::warn!(%error, "no thread for a connection"),
            }
        }
        let own = shared.work(peer, 0, &mut told);
        let others = working.into_iter().map(|thread| thread.join().expect("sending never panics"));
        culprit([own].into_iter().chain(others)).map(drop)
    })?;
    told(shared.sent());
    drop(shared);
    unknown.map_or(Ok(()), |error| Err(error.into()))
}

impl<I: Iterator<Item = (Run, bool)>> Shared<'_, I> {
    /// Sends what is left in the queues, from the `first` on, beside others who do.
    fn work<S: Stream>(
        &self,
        peer: &mut Channel<S>,
        first: usize,
        mut told: impl FnMut(Sent),
    ) -> Result<(), PeerError> {
        let (later, queues) = self.queues.split_at(first);
        let mut work = || {
            let mut pieces = Vec::new();
            for queue in queues.iter().chain(later) {
                while take(queue, &mut pieces) {
                    for piece in pieces.drain(..) {
                        self.piece(peer, piece)?;
                        told(self.sent());
                    }
                }
            }
            peer.flush()
        };
        work().inspect_err(|_| self.broken.cancel())
    }

    fn piece<S: Stream>(&self, peer: &mut Channel<S>, piece: (Run, bool)) -> Result<(), PeerError> {
        let Pass { ram, checked, pace, cancel, .. } = *self.pass;
        let (piece, touched) = piece;
        if !touched {
            self.pages.fetch_add(piece.len, Ordering::Relaxed);
            return peer.send_zero(piece);
        }
        let size = usize::try_from(piece.len).expect("a piece is small");
        let memory = ram.get_slice(piece.start, size).expect("a bitmap holds pages of its memory");
        for (first, past, zero) in stretches(&memory) {
            let start = GuestAddress(piece.start.0 + first as u64);
            let run = Run { start, len: (past - first) as u64 };
            if zero {
                peer.send_zero(run)?;
            } else {
                let content = memory.subslice(first, past - first).expect("within the piece");
                let bytes = peer.send_ram(run, &content, checked)?;
                self.content.fetch_add(bytes, Ordering::Relaxed);
                lock(pace).spend(bytes, cancel);
            }
            self.pages.fetch_add(run.len, Ordering::Relaxed);
        }
        Ok(())
    }

    fn sent(&self) -> Sent {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Sent { pages: of(&self.pages), content: of(&self.content) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes from `queue` one large piece, or several small ones: whether there was any left.
fn take(queue: &Mutex<impl Iterator<Item = (Run, bool)>>, pieces: &mut Vec<(Run, bool)>) -> bool {
    let (mut queue, mut bytes) = (lock(queue), 0);
    while bytes < FRAME_LIMIT / 2 && pieces.len() < PIECES {
        let Some(piece) = queue.next() else { break };
        bytes += if piece.1 { piece.0.len } else { 0 };
        pieces.push(piece);
    }
    !pieces.is_empty()
}

/// What there is to send of each region, in pieces of at most `most` bytes that were touched, and of
/// any size that were not. Ends early where `forget` fails, which is called before anything is known
/// of a window: a page that is a hole now may be written to in a moment.
fn queues<'a>(
    pass: &Pass<'a>,
    most: u64,
    forget: &'a Mutex<impl FnMut(&Window<'a>) -> bool>,
) -> impl Iterator<Item = impl Iterator<Item = (Run, bool)> + 'a> {
    let (ram, untouched) = (pass.ram, pass.untouched);
    pass.pages.windows_by_region(WINDOW).map(move |windows| {
        let mut holes = Holes::of(ram);
        let windows = windows.take_while(|window| lock(forget)(window)).fuse();
        let parts = windows
            .flat_map(Window::runs)
            .flat_map(move |run| if untouched { holes.parts(run) } else { vec![(run, true)] });
        parts.flat_map(move |(run, touched)| {
            let most = if touched { most } else { run.len };
            chunks(run, most).map(move |run| (run, touched))
        })
    })
}

/// `run` in pieces of at most `most` bytes.
fn chunks(run: Run, most: u64) -> impl Iterator<Item = Run> {
    (0..run.len.div_ceil(most)).map(move |index| {
        let offset = index * most;
        Run { start: GuestAddress(run.start.0 + offset), len: most.min(run.len - offset) }
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
    let mut copy = [0; GLANCE];
    (at..at + PAGE_BYTES).step_by(GLANCE).all(|at| {
        let part = memory.subslice(at, GLANCE).expect("memory comes in whole pages");
        part.copy_to(&mut copy[..]);
        copy == [0; GLANCE]
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset};

    use super::*;

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

    /// Two windows and a bit of memory that nobody ever touched.
    fn untouched_ram() -> Ram {
        let file = std::fs::File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        let size = (2 * WINDOW + 70) * PAGE_BYTES;
        file.set_len(size as u64).unwrap();
        let region = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        Ram::from_ranges_with_files([region]).unwrap()
    }

    fn pass_of<'a>(
        ram: &'a Ram,
        pages: &'a PageBitmap,
        free: &'a (Mutex<Pace>, Cancel),
    ) -> Pass<'a> {
        Pass {
            ram,
            pages,
            untouched: true,
            checked: false,
            most: FRAME_LIMIT,
            pace: &free.0,
            cancel: &free.1,
        }
    }

    fn free() -> (Mutex<Pace>, Cancel) {
        (Mutex::new(Pace::new(None)), Cancel::new())
    }

    #[test]
    fn a_page_that_is_written_just_before_it_is_forgotten_is_sent() {
        let (ram, free) = (untouched_ram(), free());
        let all = PageBitmap::full(&ram);
        let write = |window: &Window<'_>| {
            let page = GuestAddress(window.start.0 + 9 * PAGE);
            ram.write_obj(1u8, page).is_ok()
        };
        let write = Mutex::new(write);
        let pass = pass_of(&ram, &all, &free);
        let pieces = queues(&pass, FRAME_LIMIT, &write).flatten();
        let sent = pieces.filter_map(|(run, touched)| touched.then_some(run.start.0 / PAGE));
        let window = WINDOW as u64;
        assert_eq!(sent.collect::<Vec<_>>(), [9, window + 9, 2 * window + 9]);
    }

    #[test]
    fn what_is_not_sent_is_not_forgotten() {
        let (ram, free) = (untouched_ram(), free());
        let mut some = PageBitmap::empty(&ram);
        for (first, pages) in [(3, 2), (64, 1), (5000, 4000), (8260, 1)] {
            some.insert(GuestAddress(first * PAGE), pages * PAGE);
        }
        let mut forgotten = PageBitmap::empty(&ram);
        let forget = |window: &Window<'_>| forgotten.merge(window.start, window.words).is_ok();
        let (pass, forget) = (pass_of(&ram, &some, &free), Mutex::new(forget));
        let sent: Vec<_> =
            queues(&pass, FRAME_LIMIT, &forget).flatten().map(|(run, _)| run).collect();
        assert_eq!(sent.iter().map(|run| run.len / PAGE).sum::<u64>(), some.count());
        let portion = |byte: u64| byte / PORTION;
        let crossing = |run: &&Run| portion(run.start.0) != portion(run.start.0 + run.len - 1);
        assert_eq!(sent.iter().find(crossing), None);
        assert_eq!(forgotten, some);
    }

    #[test]
    fn nothing_is_sent_that_could_not_be_forgotten() {
        let (ram, free) = (untouched_ram(), free());
        let all = PageBitmap::full(&ram);
        let mut calls = 0;
        let fail = |_: &Window<'_>| {
            calls += 1;
            calls < 2
        };
        let fail = Mutex::new(fail);
        let pass = pass_of(&ram, &all, &free);
        let sent = queues(&pass, FRAME_LIMIT, &fail).flatten();
        assert_eq!(sent.map(|(run, _)| run.len).sum::<u64>(), WINDOW as u64 * PAGE);
    }

    #[test]
    fn a_run_is_cut_into_frames() {
        let run = Run { start: GuestAddress(PAGE), len: 2 * FRAME_LIMIT + PAGE };
        let lengths: Vec<_> = chunks(run, FRAME_LIMIT).map(|run| run.len).collect();
        assert_eq!(lengths, [FRAME_LIMIT, FRAME_LIMIT, PAGE]);
        assert_eq!(chunks(run, FRAME_LIMIT).last().unwrap().start.0, PAGE + 2 * FRAME_LIMIT);
    }
}
