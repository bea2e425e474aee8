//! Frames to pages. What a peer says about addresses is not trusted.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{self, Builder, scope};
use std::time::{Duration, Instant};

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::arrivals::Arrivals;
use super::{PAGE_BYTES, Ram, Run, backing};
use crate::patience::Cancel;
use crate::policy::MOST_ROUNDS;
use crate::progress::{Progress, Stage};
use crate::wire::{Channel, Lanes, Message, PeerError, Received, Stream, culprit};

/// More passes than any source makes. It may begin anew a few times, when a device kept it waiting.
const ROUNDS: u32 = 10 * MOST_ROUNDS;

/// After how many bytes of zeros a wish to stop is looked for.
const HEED: usize = 1 << 20;

/// How late it may be noticed that all connections are at the same point.
const NAP: Duration = Duration::from_millis(1);

type Slice<'a> = VolatileSlice<'a, BS<'a, vm_memory::bitmap::AtomicBitmap>>;

/// Memory on its way in, pass after pass, over all connections of a migration.
pub(crate) struct Passes<'a> {
    ram: &'a Ram,
    silence: Duration,
    /// Set where a connection breaks, heeded by all.
    broken: Cancel,
    /// How often a lane, any of them, told that a pass ends.
    rounds: AtomicU32,
    /// How many lanes have ended.
    over: AtomicU32,
    /// The pages that came at all.
    arrivals: Arrivals,
    /// Bytes of the guest that came.
    pages: AtomicU64,
    /// Whether the state came, behind which there is no memory.
    ended: AtomicBool,
}

impl<'a> Passes<'a> {
    /// Into `ram`, giving up after `silence`.
    pub(crate) fn new(ram: &'a Ram, silence: Duration, broken: Cancel) -> Self {
        Self {
            ram,
            silence,
            broken,
            rounds: AtomicU32::new(0),
            over: AtomicU32::new(0),
            arrivals: Arrivals::none(ram),
            pages: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Receives until the state comes over `peer` and each of `lanes` has ended, by when every page
    /// must have come: gives the state, and how many passes it took.
    pub(crate) fn receive<S: Stream>(
        &self,
        peer: &mut Channel<S>,
        lanes: &mut Lanes<S>,
        first: Option<Received>,
        watcher: &mut dyn FnMut(&Progress),
    ) -> Result<(Vec<u8>, u32), PeerError> {
        let count = u32::try_from(lanes.iter_mut().len()).expect("there are few lanes");
        scope(|threads| {
            let spawn = |lane| {
                let thread = Builder::new().name("lane".into());
                thread.spawn_scoped(threads, move || self.lane(lane))
            };
            let spawned: Result<Vec<_>, _> = lanes.iter_mut().map(spawn).collect();
            let own = match &spawned {
                Ok(_) => self.first_lane(peer, count, first, watcher),
                Err(error) => {
                    tracing::warn!(%error, "no thread for a connection");
                    Err(peer.garbage("more connections than there are threads for".into()))
                }
            };
            let own = own.inspect_err(|_| self.broken.cancel());
            let others = spawned.into_iter().flatten();
            let others = others.map(|lane| lane.join().expect("receiving never panics"));
            let mut whole = None;
            let own = own.map(|received| whole = Some(received));
            culprit([own].into_iter().chain(others))?;
            if !self.arrivals.is_all() {
                return Err(peer.garbage("only a part of the memory".into()));
            }
            Ok(whole.expect("it ended well"))
        })
    }

    /// The connection that also carries what is said.
    fn first_lane<S: Stream>(
        &self,
        peer: &mut Channel<S>,
        lanes: u32,
        mut first: Option<Received>,
        watcher: &mut dyn FnMut(&Progress),
    ) -> Result<(Vec<u8>, u32), PeerError> {
        let mut progress = Progress { stage: Stage::Copying, round: 1, ..Progress::default() };
        let mut before = 0;
        loop {
            let received = match first.take() {
                Some(first) => first,
                None => peer.receive(self.silence)?,
            };
            match received {
                Received::Message(Message::Alive) => {}
                Received::Message(Message::RoundEnd) => {
                    let ends = progress.round.saturating_mul(lanes);
                    self.await_lanes(peer, &self.rounds, ends, "a pass")?;
                    peer.send(&Message::RoundTaken)?;
                    if progress.round == ROUNDS {
                        return Err(peer.garbage(format!("more than {ROUNDS} passes of memory")));
                    }
                    progress.round += 1;
                    before = self.pages.load(Ordering::Relaxed);
                }
                Received::Message(other) => return Err(peer.unexpected(&other)),
                Received::State(state) => {
                    self.ended.store(true, Ordering::Release);
                    // A source waits no longer either; what drips is not waited for.
                    self.await_lanes(peer, &self.over, lanes, "its other connections")?;
                    return Ok((state, progress.round));
                }
                memory => self.take(peer, &memory)?,
            }
            progress.round_done = self.pages.load(Ordering::Relaxed) - before;
            progress.bytes_sent = peer.bytes();
            watcher(&progress);
        }
    }

    /// Another connection.
    fn lane<S: Stream>(&self, peer: &mut Channel<S>) -> Result<(), PeerError> {
        let mut receive = || loop {
            // Where it has nothing to carry, only the first connection tells of a source that lives.
            while !peer.comes(self.silence)? {
                if self.ended.load(Ordering::Acquire) {
                    return Err(peer.stalled(self.silence));
                }
            }
            match peer.receive(self.silence)? {
                Received::Message(Message::RoundEnd) => {
                    self.rounds.fetch_add(1, Ordering::Release);
                }
                Received::Message(Message::End(totals)) if totals == peer.totals() => {
                    self.over.fetch_add(1, Ordering::Release);
                    return Ok(());
                }
                Received::Message(other) => return Err(peer.unexpected(&other)),
                Received::State(_) => return Err(peer.garbage("state".into())),
                memory => self.take(peer, &memory)?,
            }
        };
        receive().inspect_err(|_| self.broken.cancel())
    }

    /// Waits until the lanes have told `ends` times that `what` ends: nothing of it comes later.
    fn await_lanes<S: Stream>(
        &self,
        peer: &Channel<S>,
        told: &AtomicU32,
        ends: u32,
        what: &'static str,
    ) -> Result<(), PeerError> {
        let start = Instant::now();
        let mut nap = Duration::from_micros(20);
        while told.load(Ordering::Acquire) < ends {
            if start.elapsed() > self.silence {
                return Err(peer.slow(what, self.silence));
            }
            peer.look_up()?;
            thread::sleep(nap);
            nap = (nap * 2).min(NAP);
        }
        Ok(())
    }

    fn take<S: Stream>(&self, peer: &mut Channel<S>, memory: &Received) -> Result<(), PeerError> {
        let run = match *memory {
            Received::Ram { run, checked, packed } => {
                let file = backing(self.ram, run.start);
                peer.read_ram(&slice(peer, self.ram, run)?, file, checked, packed)?;
                run
            }
            Received::Zero(run) => {
                zero(peer, self.ram, run)?;
                run
            }
            Received::Message(_) | Received::State(_) => return Ok(()),
        };
        self.arrivals.insert(run);
        self.pages.fetch_add(run.len, Ordering::Relaxed);
        Ok(())
    }
}

/// Makes `run` of `ram` zero. Pages that nobody wrote to are: touching them would only cost.
///
/// Few bytes of a peer can ask for much work here, so a wish to stop is heeded in between.
pub(crate) fn zero<S: Stream>(peer: &Channel<S>, ram: &Ram, run: Run) -> Result<(), PeerError> {
    let size = usize::try_from(run.len).map_err(|_| nowhere(peer, run))?;
    // Regions may meet within it: how they lie at the source is not known here.
    for memory in ram.get_slices(run.start, size) {
        let memory = memory.map_err(|_| nowhere(peer, run))?;
        for at in (0..memory.len()).step_by(PAGE_BYTES) {
            if at % HEED == 0 {
                peer.look_up()?;
            }
            if memory.bitmap().dirty_at(at) {
                let page = memory.subslice(at, PAGE_BYTES).expect("a run is made of whole pages");
                page.copy_from(&[0; PAGE_BYTES]);
            }
        }
    }
    Ok(())
}

/// The memory that content comes for: within a portion, and so within a region.
fn slice<'a, S: Stream>(peer: &Channel<S>, ram: &'a Ram, run: Run) -> Result<Slice<'a>, PeerError> {
    let size = usize::try_from(run.len).ok();
    let slice = size.and_then(|size| ram.get_slice(run.start, size).ok());
    slice.ok_or_else(|| nowhere(peer, run))
}

fn nowhere<S: Stream>(peer: &Channel<S>, run: Run) -> PeerError {
    peer.garbage(format!("{} bytes at {:#x}, where no memory is", run.len, run.start.0))
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

    #[test]
    fn zeros_may_cross_from_region_to_region_but_not_leave_memory() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let peer = Channel::new(stream, Duration::from_secs(1), Cancel::new()).unwrap();
        let regions = [0, 2 * PAGE].map(|start| (GuestAddress(start), 2 * PAGE_BYTES));
        let ram = Ram::from_ranges(&regions).unwrap();
        ram.write_slice(&[1; 4 * PAGE_BYTES], GuestAddress(0)).unwrap();
        zero(&peer, &ram, Run { start: GuestAddress(PAGE), len: 2 * PAGE }).unwrap();
        let first = |page: u64| ram.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([0, 1, 2, 3].map(first), [1, 0, 0, 1]);
        let beyond = zero(&peer, &ram, Run { start: GuestAddress(3 * PAGE), len: 2 * PAGE });
        assert!(matches!(beyond, Err(PeerError::Garbage { .. })), "{beyond:?}");
    }

    #[test]
    fn a_wish_to_stop_is_heeded_among_zeros() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let cancel = Cancel::new();
        let peer = Channel::new(stream, Duration::from_secs(1), cancel.clone()).unwrap();
        let ram = Ram::from_ranges(&[(GuestAddress(0), 2 * HEED)]).unwrap();
        ram.write_obj(7_u8, GuestAddress(HEED as u64)).unwrap();
        cancel.cancel();
        let zeroed = zero(&peer, &ram, Run { start: GuestAddress(0), len: 2 * HEED as u64 });
        assert!(matches!(zeroed, Err(PeerError::Cancelled)), "{zeroed:?}");
        assert_eq!(ram.read_obj::<u8>(GuestAddress(HEED as u64)).unwrap(), 7);
    }
}
