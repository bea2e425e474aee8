//! vCPUs: one thread each, told what to do by messages.

mod run;
mod signal;
mod throttle;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use crate::arch::vcpu::VcpuV1;
use crate::kvm::{self, Vm};

pub(crate) use run::{Exits, Wiring};
pub(crate) use signal::block_kicks;
pub(crate) use throttle::Throttle;

/// All vCPUs of a machine.
pub(crate) struct Vcpus(Vec<Vcpu>);

impl Vcpus {
    pub(crate) fn new(vcpus: Vec<Vcpu>) -> Self {
        Self(vcpus)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Vcpu> {
        self.0.iter()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.iter().try_for_each(Vcpu::resume)
    }

    /// Stops the guest: returns when every vCPU is out of it, with no exit half done.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        // All are asked before the first is waited for, so that they leave together.
        let pausing: Vec<_> = self.iter().map(Vcpu::pause).collect::<Result<_, _>>()?;
        pausing.into_iter().try_for_each(Leaving::wait)
    }

    /// Has all vCPUs leave the guest once, so that what they wrote has come to their dirty rings.
    /// Those that run go back to it.
    pub(crate) fn step_out(&self) -> Result<(), Error> {
        let leaving: Vec<_> = self.iter().map(Vcpu::step_out).collect::<Result<_, _>>()?;
        leaving.into_iter().try_for_each(Leaving::wait)
    }

    /// Has vCPUs stay out of the guest for a time that `time` tells by their number, if it does:
    /// until then, or until they are told so again.
    fn rest(&self, time: impl Fn(usize) -> Option<Duration>) {
        let told = self.iter().enumerate().filter_map(|(index, vcpu)| Some((vcpu, time(index)?)));
        for (vcpu, time) in told {
            if let Err(error) = vcpu.tell(Command::Rest(time)) {
                tracing::debug!(%error, "cannot let it rest");
            }
        }
    }
}

/// A vCPU, stopped until [`Vcpu::resume`].
pub(crate) struct Vcpu {
    index: u8,
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

/// What a vCPU's thread is told; those with a sender are answered.
enum Command {
    Resume,
    Pause(Sender<()>),
    StepOut(Sender<()>),
    Rest(Duration),
    Save(Sender<Result<VcpuV1, kvm::Error>>),
    Msrs(Sender<Result<Vec<(u32, u64)>, kvm::Error>>),
    Load(Box<VcpuV1>, Sender<Result<(), kvm::Error>>),
    SetTscOffset(u64, Sender<Result<(), kvm::Error>>),
    Exit,
}

/// Why a vCPU does not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Its thread cannot be started.
    #[error("cannot start the thread of vCPU {0}")]
    Start(u8, #[source] io::Error),
    /// KVM refused.
    #[error("vCPU {0}")]
    Kvm(u8, #[source] kvm::Error),
    /// KVM refused the clock that all of them share.
    #[error(transparent)]
    Clock(kvm::Error),
    /// Its thread is gone, which it never is but after a bug.
    #[error("the thread of vCPU {0} is gone")]
    Gone(u8),
}

impl Vcpu {
    /// Starts the thread of a vCPU that is ready to run.
    pub(crate) fn start(
        index: u8,
        fd: kvm_ioctls::VcpuFd,
        vm: Arc<Vm>,
        wiring: Wiring,
    ) -> Result<Self, Error> {
        let (commands, receiver): (_, Receiver<Command>) = channel();
        signal::let_kicks_in(&fd).map_err(|source| {
            Error::Kvm(index, kvm::Error::Ioctl { name: "KVM_SET_SIGNAL_MASK", source })
        })?;
        let thread = Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 << 10)
            .spawn(move || run::Runner::new(index, fd, vm, wiring).serve(&receiver))
            .map_err(|source| Error::Start(index, source))?;
        Ok(Self { index, commands, thread: Some(thread) })
    }

    /// Lets the guest run on it.
    fn resume(&self) -> Result<(), Error> {
        self.tell(Command::Resume)
    }

    /// Asks it to leave the guest and stay out; [`Leaving::wait`] returns once it has.
    fn pause(&self) -> Result<Leaving, Error> {
        self.ask(Command::Pause).map(|reply| Leaving { index: self.index, reply })
    }

    /// Asks it to leave the guest; [`Leaving::wait`] returns once it has.
    fn step_out(&self) -> Result<Leaving, Error> {
        self.ask(Command::StepOut).map(|reply| Leaving { index: self.index, reply })
    }

    /// Reads its state. It must be paused.
    pub(crate) fn save(&self) -> Result<VcpuV1, Error> {
        let state = self.answer(&self.ask(Command::Save)?)?;
        state.map_err(|source| Error::Kvm(self.index, source))
    }

    /// Its model-specific registers with their values of now. It may run.
    pub(crate) fn msrs(&self) -> Result<Vec<(u32, u64)>, Error> {
        let msrs = self.answer(&self.ask(Command::Msrs)?)?;
        msrs.map_err(|source| Error::Kvm(self.index, source))
    }

    /// Replaces its state. It must never have run.
    pub(crate) fn load(&self, state: VcpuV1) -> Result<(), Error> {
        let reply = self.ask(|reply| Command::Load(Box::new(state), reply))?;
        self.answer(&reply)?.map_err(|source| Error::Kvm(self.index, source))
    }

    /// Moves its time-stamp counter to `offset` ahead of the host's. It must be paused.
    pub(crate) fn set_tsc_offset(&self, offset: u64) -> Result<(), Error> {
        let reply = self.ask(|reply| Command::SetTscOffset(offset, reply))?;
        self.answer(&reply)?.map_err(|source| Error::Kvm(self.index, source))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<Receiver<T>, Error> {
        let (sender, receiver) = channel();
        self.tell(command(sender))?;
        Ok(receiver)
    }

    fn answer<T>(&self, reply: &Receiver<T>) -> Result<T, Error> {
        reply.recv().map_err(|_| Error::Gone(self.index))
    }

    fn tell(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).map_err(|_| Error::Gone(self.index))?;
        if let Some(thread) = &self.thread {
            // A thread that has ended cannot be kicked; then there is nobody to answer either.
            thread.kill(signal::kick()).map_err(|_| Error::Gone(self.index))?;
        }
        Ok(())
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if self.tell(Command::Exit).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(index = self.index, "a vCPU's thread panicked");
        }
    }
}

/// A vCPU on its way out of the guest.
#[must_use]
struct Leaving {
    index: u8,
    reply: Receiver<()>,
}

impl Leaving {
    /// Returns when the vCPU is out of the guest; if it was paused, with its last exit completed.
    fn wait(self) -> Result<(), Error> {
        self.reply.recv().map_err(|_| Error::Gone(self.index))
    }
}
