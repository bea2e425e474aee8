//! Why there is no guest.

use std::io;
use std::path::PathBuf;

use crate::config::Address;
use crate::console::ConsoleError;
use crate::control::{RuntimeDirError, ServerError, StateDirError};
use crate::machine;
use crate::vcpu;

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The kernel takes no signal mask.
    #[error("cannot block signals ({0:?})")]
    Signals(vmm_sys_util::signal::Error),
    /// The process has no file descriptors left.
    #[error("cannot set up the event loop")]
    Events(#[source] io::Error),
    /// The event loop broke.
    #[error("the event loop failed ({0:?})")]
    EventLoop(event_manager::Error),
    /// The name is in use, or cannot be used.
    #[error(transparent)]
    Name(#[from] RuntimeDirError),
    /// A guest of that name may run elsewhere, or nothing can be written of one that arrives.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// No control socket.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The serial line leads nowhere.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// No machine.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The guest does not run.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// No guest can arrive at that address.
    #[error("cannot wait for a guest at {at}")]
    Incoming {
        /// The address.
        at: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No guest arrived.
    #[error("no guest arrived")]
    Arrival(#[source] migration::Error),
    /// There is no such file.
    #[error("cannot read the snapshot {path}", path = path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no guest in the file.
    #[error("no guest was restored")]
    Restore(#[source] migration::Error),
    /// A guest that came from elsewhere asked for a reset.
    #[error(
        "the guest asked for a reset, and there is nothing here to boot it from: \
         give --kernel beside --incoming or --restore"
    )]
    NothingToBoot,
}
