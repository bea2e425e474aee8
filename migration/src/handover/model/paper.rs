//! What a side has on paper, and disks that do not do as they say.

use std::io;
use std::sync::{Arc, Mutex};

use super::Flaw;
use crate::handover::{Handover, Token};
use crate::record::{Record, Role};

/// How a disk behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    Writes,
    /// Says that it did not write, and did not.
    Refuses,
    /// Says that it did not write, but did.
    Lies,
    /// Writes once, then refuses.
    Fills,
}

pub(super) const DISKS: [Disk; 4] = [Disk::Writes, Disk::Refuses, Disk::Lies, Disk::Fills];

/// Paper for one token, as a process holds it.
struct Paper {
    text: Arc<Mutex<Option<Role>>>,
    disk: Disk,
    flaw: Option<Flaw>,
}

impl Record for Paper {
    fn write(&mut self, _: Token, role: Role) -> io::Result<()> {
        let loses = self.flaw.is_some_and(|flaw| flaw.loses(role));
        let disk = self.disk;
        if disk != Disk::Refuses && !loses {
            *self.text.lock().unwrap() = Some(role);
        }
        if disk == Disk::Fills {
            self.disk = Disk::Refuses;
        }
        match disk {
            Disk::Writes | Disk::Fills => Ok(()),
            Disk::Refuses | Disk::Lies => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    fn forget(&mut self, _: Token) -> io::Result<()> {
        *self.text.lock().unwrap() = None;
        Ok(())
    }

    fn earlier(&self, _: Token) -> io::Result<Option<(Role, Box<dyn Record>)>> {
        Ok(None)
    }
}

/// Lets `act` work on a half that stands at `state` and has `text` on paper; gives what it gave.
pub(super) fn with<T: Copy + PartialEq, R>(
    (state, promised): (&mut T, &mut bool),
    text: &mut Option<Role>,
    (disk, flaw): (Disk, Option<Flaw>),
    act: impl FnOnce(&mut Handover<T>) -> R,
) -> R {
    let paper = Arc::new(Mutex::new(*text));
    let token = "00112233445566778899aabbccddeeff".parse().unwrap();
    let record = Box::new(Paper { text: paper.clone(), disk, flaw });
    let mut half = Handover { state: *state, token, record, promised: *promised };
    let gave = act(&mut half);
    (*state, *promised) = (half.state, half.promised);
    *text = *paper.lock().unwrap();
    gave
}
