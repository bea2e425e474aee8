//! The content of pages over a channel: as it is, summed up, or packed.

use std::fs::File;
use std::time::Instant;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::Channel;
use crate::ram::Run;
use crate::wire::hello::PACKED_SINCE;
use crate::wire::link::{SMALL, put};
use crate::wire::pack::Packed;
use crate::wire::{Codec, Compression, Frame, PeerError, Stream};

/// How much memory is summed up in one go, and copied for that: what a processor's cache holds.
pub(super) const PART: usize = 128 << 10;

impl<S: Stream> Channel<S> {
    /// Has memory packed from here on, if the peer can unpack it.
    pub(crate) fn pack_with(&mut self, compression: Compression) {
        if self.version >= PACKED_SINCE {
            self.choice = compression.choice();
        }
    }

    /// Sends the pages of `run`, which `slice` holds; with a checksum if `checked`. Tells how many
    /// bytes their content takes on the wire.
    pub(crate) fn send_ram<B: BitmapSlice>(
        &mut self,
        run: Run,
        slice: &VolatileSlice<'_, B>,
        checked: bool,
    ) -> Result<u64, PeerError> {
        if let Some(codec) = self.choice.next(run.len, Instant::now()) {
            return self.send_packed(run, slice, checked, codec);
        }
        let header = Frame::Ram { run, checked, packed: None }.encode();
        self.totals.ram(run, header);
        self.link.gather(&header);
        if slice.len() > SMALL {
            self.link.flush_before_more()?;
            if checked { self.send_summed(slice) } else { self.link.write_memory(slice) }?;
            return Ok(run.len);
        }
        let content = self.link.gather_memory(slice);
        if checked {
            let sum = crc32fast::hash(content).to_le_bytes();
            self.link.gather(&sum);
        }
        self.link.flush_much().map(|()| run.len)
    }

    /// Sends what `slice` holds packed, or as it is where that is hardly larger.
    fn send_packed<B: BitmapSlice>(
        &mut self,
        run: Run,
        slice: &VolatileSlice<'_, B>,
        checked: bool,
        codec: Codec,
    ) -> Result<u64, PeerError> {
        let start = Instant::now();
        let Packed { content, packed } = self.packer.pack(codec, slice);
        self.packing += start.elapsed();
        let header = Frame::Ram { run, checked, packed: packed.map(|_| codec) }.encode();
        self.totals.ram(run, header);
        self.link.gather(&header);
        if let Some(packed) = packed {
            let size = u32::try_from(packed.len()).expect("it is smaller than a frame");
            self.link.gather(&size.to_le_bytes());
            self.saved += run.len - u64::from(size);
        }
        let wire = packed.unwrap_or(content);
        if wire.len() > SMALL {
            self.link.flush_before_more()?;
            self.link.write_all(wire)?;
        } else {
            self.link.gather(wire);
        }
        if checked {
            self.link.gather(&crc32fast::hash(content).to_le_bytes());
        }
        self.link.flush_much().map(|()| wire.len() as u64)
    }

    /// Sends what `slice` holds and its checksum. The guest may be writing: what is summed up must be
    /// what is sent, so each part is copied while a processor's cache holds it.
    fn send_summed<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
    ) -> Result<(), PeerError> {
        let mut sum = crc32fast::Hasher::new();
        for at in (0..slice.len()).step_by(PART) {
            let part = part_of(slice, at);
            let content = &mut self.scratch[..part.len()];
            part.copy_to(&mut content[..]);
            sum.update(content);
            self.link.write_all(content)?;
        }
        self.link.gather(&sum.finalize().to_le_bytes());
        self.link.flush_much()
    }

    /// Reads the content of pages into `slice`, which maps `backing` if that is a file.
    pub(crate) fn read_ram<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
        backing: Option<(&File, u64)>,
        checked: bool,
        packed: Option<Codec>,
    ) -> Result<(), PeerError> {
        match (packed, checked) {
            (Some(codec), _) => self.read_packed(slice, backing, checked, codec),
            (None, true) => self.read_summed(slice, backing),
            (None, false) => self.link.read_memory(slice, backing),
        }
    }

    /// Reads packed content, and its checksum if it is `checked`.
    fn read_packed<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
        backing: Option<(&File, u64)>,
        checked: bool,
        codec: Codec,
    ) -> Result<(), PeerError> {
        let mut size = [0; 4];
        self.link.read_exact(&mut size, None)?;
        let size = u32::from_le_bytes(size) as usize;
        if size >= slice.len() {
            return Err(self.garbage(format!("{} bytes packed to {size}", slice.len())));
        }
        self.link.expect_memory(size);
        self.link.read_exact(self.packer.room_for(size), None)?;
        let Some(content) = self.packer.unpack(codec, size, slice.len()) else {
            return Err(self.garbage("packed memory that does not unpack".into()));
        };
        put(content, slice, backing);
        let sum = checked.then(|| crc32fast::hash(content));
        self.check(sum)
    }

    /// Reads a checksum, if there is one: whether it is `sum`.
    fn check(&mut self, sum: Option<u32>) -> Result<(), PeerError> {
        let Some(sum) = sum else { return Ok(()) };
        let mut theirs = [0; 4];
        self.link.read_exact(&mut theirs, None)?;
        if sum == u32::from_le_bytes(theirs) {
            return Ok(());
        }
        Err(self.garbage("memory with a wrong checksum".into()))
    }

    /// Reads content and its checksum, part by part while a processor's cache holds it.
    fn read_summed<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'_, B>,
        backing: Option<(&File, u64)>,
    ) -> Result<(), PeerError> {
        let mut sum = crc32fast::Hasher::new();
        self.link.expect_memory(slice.len());
        for at in (0..slice.len()).step_by(PART) {
            let part = part_of(slice, at);
            let content = &mut self.scratch[..part.len()];
            self.link.read_exact(content, None)?;
            sum.update(content);
            put(content, &part, backing.map(|(file, offset)| (file, offset + at as u64)));
        }
        self.check(Some(sum.finalize()))
    }
}

/// The part of `slice` at `at` that is copied in one go.
fn part_of<'a, B: BitmapSlice>(slice: &VolatileSlice<'a, B>, at: usize) -> VolatileSlice<'a, B> {
    slice.subslice(at, PART.min(slice.len() - at)).expect("within the slice")
}
