//! The source's end of a connection whose sides take each other for other builds.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::wire::{Hello, Stream};

pub(super) struct Disguised {
    stream: UnixStream,
    /// What each side is still to hear of the other's versions: the source, and the destination.
    hear: [Option<Hello>; 2],
    said: Arc<Mutex<Vec<u8>>>,
}

impl Disguised {
    /// Over `stream`, whose sides hear these versions of each other: the source, and the destination.
    pub(super) fn new(stream: UnixStream, hear: [(u16, u16); 2]) -> Self {
        let hear = hear.map(|versions| Some(Hello { versions }));
        Self { stream, hear, said: Arc::default() }
    }

    /// All that the destination hears.
    pub(super) fn said(&self) -> Arc<Mutex<Vec<u8>>> {
        self.said.clone()
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.stream.write(bytes)?;
        self.said.lock().unwrap().extend(&bytes[..written]);
        Ok(written)
    }
}

impl Read for Disguised {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(hello) = self.hear[0].take() else { return self.stream.read(bytes) };
        let hello = hello.encode();
        let bytes = &mut bytes[..hello.len()];
        self.stream.read_exact(bytes)?;
        bytes.copy_from_slice(&hello);
        Ok(hello.len())
    }
}

impl Write for Disguised {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.hear[1].take() {
            Some(hello) => self.say(&hello.encode()),
            None => self.say(bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Disguised {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        _: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        unreachable!("a source receives no memory")
    }
}

impl WriteVolatile for Disguised {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; memory.len()];
        memory.copy_to(&mut bytes[..]);
        self.say(&bytes).map_err(VolatileMemoryError::IOError)
    }
}

impl Stream for Disguised {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_timeout(limit)
    }
    fn peer(&self) -> String {
        "another build".into()
    }
    fn local(&self) -> Option<BorrowedFd<'_>> {
        self.stream.local()
    }
}
