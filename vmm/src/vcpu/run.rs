//! The thread of a vCPU: in the guest, at a device, or waiting to be told.

// UNSAFETY: the width of a port access is in a union of the shared run structure.
#![expect(unsafe_code, reason = "kvm_run's union is read for the exit that it belongs to")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Instant;

use devices::bus::Bus;
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Command, signal};
use crate::arch::{msr, vcpu};
use crate::cause;
use crate::event::{Event, Events};
use crate::kvm::{Vm, tsc};

/// What a vCPU's exits go to.
#[derive(Clone)]
pub(crate) struct Wiring {
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) events: Events,
    pub(crate) exits: Arc<Exits>,
}

/// How often vCPUs left the guest for the VMM.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    pub(crate) pio: AtomicU64,
    pub(crate) mmio: AtomicU64,
}

pub(super) struct Runner {
    index: u8,
    fd: VcpuFd,
    vm: Arc<Vm>,
    wiring: Wiring,
    running: bool,
    /// Until when to stay out of the guest although it runs.
    rest: Option<Instant>,
    /// What is still to be written before it first runs here.
    later: Vec<(u32, u64)>,
}

/// Why a vCPU is out of the guest.
enum Left {
    /// For something that was served.
    Exit,
    /// Because somebody asked.
    Interrupted,
    /// For good.
    Dead,
}

impl Runner {
    pub(super) fn new(index: u8, fd: VcpuFd, vm: Arc<Vm>, wiring: Wiring) -> Self {
        Self { index, fd, vm, wiring, running: false, rest: None, later: Vec::new() }
    }

    /// Does what it is told until it is told to end.
    pub(super) fn serve(mut self, commands: &Receiver<Command>) {
        loop {
            let command = match self.next(commands) {
                Err(TryRecvError::Empty) => continue,
                command => command.ok(),
            };
            match command {
                Some(Command::Resume) => self.resume(),
                Some(Command::Pause(reply)) => self.pause(&reply),
                Some(Command::StepOut(reply)) => drop(reply.send(())),
                Some(Command::Rest(time)) => self.rest = Some(Instant::now() + time),
                Some(Command::Save(reply)) => drop(reply.send(self.save())),
                Some(Command::Msrs(reply)) => {
                    drop(reply.send(vcpu::msrs(self.vm.kvm(), &self.fd)));
                }
                Some(Command::Load(state, reply)) => {
                    drop(reply.send(self.load(*state)));
                }
                Some(Command::SetTscOffset(offset, reply)) => {
                    drop(reply.send(tsc::set_offset(&self.fd, offset)));
                }
                Some(Command::Exit) | None => return,
            }
        }
    }

    /// Runs, rests or waits until there may be something to do, and takes that.
    fn next(&mut self, commands: &Receiver<Command>) -> Result<Command, TryRecvError> {
        if !self.running {
            return commands.recv().map_err(|_| TryRecvError::Disconnected);
        }
        if let Some(end) = self.rest {
            let left = end.saturating_duration_since(Instant::now());
            return commands.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => {
                    self.rest = None;
                    TryRecvError::Empty
                }
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            });
        }
        self.enter();
        commands.try_recv()
    }

    fn resume(&mut self) {
        let later = std::mem::take(&mut self.later);
        if let Err(error) = msr::write(&self.fd, &later) {
            let why = format!("cannot go on: {}", cause::chain(&error));
            return self.wiring.events.send(Event::Died { vcpu: self.index, why });
        }
        vcpu::note_pause(&self.fd);
        (self.running, self.rest) = (true, None);
    }

    fn load(&mut self, state: vcpu::VcpuV1) -> Result<(), crate::kvm::Error> {
        self.later = vcpu::load(self.vm.kvm(), &self.fd, state)?;
        Ok(())
    }

    fn pause(&mut self, reply: &Sender<()>) {
        if std::mem::take(&mut self.running) {
            self.complete_exit();
        }
        // Whoever asked may have given up.
        let _ = reply.send(());
    }

    fn save(&self) -> Result<vcpu::VcpuV1, crate::kvm::Error> {
        let state = vcpu::save(self.vm.kvm(), &self.fd)?;
        Ok(state.with(&self.later))
    }

    /// Finishes an instruction that waits for the result of its exit: KVM does so at the next
    /// KVM_RUN, and no ioctl tells of it before.
    ///
    /// A string instruction, or an access that crosses a page, goes on to exits of its own; KVM
    /// lets go of it after 1024 repetitions at the latest.
    fn complete_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        while matches!(self.enter(), Left::Exit) {}
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Enters the guest until it leaves for any reason, and serves that.
    fn enter(&mut self) -> Left {
        let run = std::ptr::from_ref(self.fd.get_kvm_run());
        let Wiring { pio, mmio, exits, .. } = &self.wiring;
        let died = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.pio.fetch_add(1, Ordering::Relaxed);
                for access in data.chunks_mut(port_width(run)) {
                    pio.read(u64::from(port), access);
                }
                return Left::Exit;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.pio.fetch_add(1, Ordering::Relaxed);
                for access in data.chunks(port_width(run)) {
                    pio.write(u64::from(port), access);
                }
                return Left::Exit;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.mmio.fetch_add(1, Ordering::Relaxed);
                mmio.read(address, data);
                return Left::Exit;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.mmio.fetch_add(1, Ordering::Relaxed);
                mmio.write(address, data);
                return Left::Exit;
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match self.vm.harvest() {
                Ok(_) => return Left::Exit,
                Err(error) => format!("its dirty ring is full: {}", cause::chain(&error)),
            },
            Ok(VcpuExit::Intr) => return Left::Interrupted,
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::InternalError) => {
                "KVM gave up on an instruction (KVM_EXIT_INTERNAL_ERROR)".to_owned()
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                format!("the processor refused to enter the guest (reason {reason:#x})")
            }
            Ok(exit) => format!("KVM left the guest for a reason unknown here: {exit:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                signal::take_kick();
                return Left::Interrupted;
            }
            Err(error) => format!("KVM_RUN: {error}"),
        };
        self.running = false;
        self.wiring.events.send(Event::Died { vcpu: self.index, why: died });
        Left::Dead
    }
}

/// Bytes of one access of a port exit: a string instruction makes several in one exit.
fn port_width(run: *const kvm_run) -> usize {
    // SAFETY: `run` is the vCPU's run structure, mapped as long as its file descriptor is open,
    // and KVM writes it only within KVM_RUN.
    let exit = unsafe { (*run).__bindgen_anon_1 };
    // SAFETY: every bit pattern is a valid byte.
    let width = unsafe { exit.io.size };
    usize::from(width).max(1)
}
