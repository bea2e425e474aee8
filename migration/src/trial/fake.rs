//! A guest whose vCPU is a thread that writes memory, and the hosts it lives on.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::sources::{Busy, Ledger, behind};
use crate::compat::{Mismatch, Offer, Profile, Rule, agree};
use crate::guest::{Arriving, Departing, Host};
use crate::plan::{Meanwhile, Phase, Plan, Priority, Step, StepFailure};
use crate::policy::Shares;
use crate::ram::{DirtySet, OwnWrites, PAGE, Ram};
use crate::report::Device;
use crate::state::{Format, Saved, StateError, StateReader, StateWriter};

pub(super) const LOW_PAGES: u64 = 8;
pub(super) const HIGH: u64 = 1 << 32;
pub(super) const HIGH_PAGES: u64 = 4;

pub(super) fn ram(low_pages: u64) -> Ram {
    let bytes = |pages: u64| usize::try_from(pages * PAGE).unwrap();
    let ranges = [(GuestAddress(0), bytes(low_pages)), (GuestAddress(HIGH), bytes(HIGH_PAGES))];
    Ram::from_ranges(&ranges).unwrap()
}

/// The same, in two files: what is low, and what is high.
pub(super) fn mapped(files: &[File]) -> Ram {
    let [low, high] = files else { panic!("{} files", files.len()) };
    let region = |start, file: &File| {
        let bytes = usize::try_from(file.metadata().unwrap().len()).unwrap();
        (GuestAddress(start), bytes, Some(FileOffset::new(file.try_clone().unwrap(), 0)))
    };
    Ram::from_ranges_with_files([region(0, low), region(HIGH, high)]).unwrap()
}

pub(super) fn content(ram: &Ram) -> Vec<u8> {
    let region = |region: &<Ram as GuestMemoryBackend>::R| {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        ram.read_slice(&mut bytes, region.start_addr()).unwrap();
        bytes
    };
    ram.iter().flat_map(region).collect()
}

/// Where the guest runs. Notices if that is ever two places.
#[derive(Default)]
pub(super) struct World {
    pub(super) here: AtomicBool,
    pub(super) there: AtomicBool,
    pub(super) twice: AtomicBool,
    pub(super) undone: AtomicU32,
}

impl World {
    fn run(&self, place: &AtomicBool, other: &AtomicBool) {
        place.store(true, Ordering::SeqCst);
        if other.load(Ordering::SeqCst) {
            self.twice.store(true, Ordering::SeqCst);
        }
    }

    /// Whether it runs here, and there.
    pub(super) fn runners(&self) -> (bool, bool) {
        assert!(!self.twice.load(Ordering::SeqCst), "the guest ran twice");
        (self.here.load(Ordering::SeqCst), self.there.load(Ordering::SeqCst))
    }
}

/// What goes wrong in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    #[default]
    None,
    /// A device refuses to stop.
    StuckDevice,
    /// A relay writes memory after the vCPUs stopped, as it should.
    Relay,
    /// A device writes memory while it saves its state.
    LateWriter,
    /// The destination refuses the state.
    BadState,
    /// The destination cannot start vCPUs.
    NoStart,
    /// The destination lacks a device.
    Mismatch,
    /// The destination reads only an older version of the state.
    OldFormat,
}

#[derive(Serialize, Deserialize)]
struct CounterV1 {
    count: u64,
}

impl Saved for CounterV1 {
    const KIND: &'static str = "counter";
    const VERSION: u16 = 1;
}

/// Between two writes of a vCPU, at least.
const STEP: Duration = Duration::from_micros(20);

/// A vCPU: while it runs, it counts and writes the count all over a part of memory.
struct Vcpu {
    shared: VcpuState,
    /// Its throttle, of a second vCPU, which does nothing, when it was most.
    bystander: u8,
    thread: Option<(JoinHandle<()>, Arc<AtomicBool>)>,
}

/// What is known of a vCPU by those who stop it, slow it down or read its writes.
#[derive(Clone)]
pub(super) struct VcpuState {
    pub(super) running: Arc<Mutex<bool>>,
    pub(super) count: Arc<AtomicU64>,
    /// For how much of the time it is kept from running, in percent.
    pub(super) throttle: Arc<AtomicU8>,
    /// Whether it writes by itself.
    pub(super) writes: Arc<AtomicBool>,
}

impl VcpuState {
    /// Writes the next count somewhere in the `pages` pages from `first` on.
    pub(super) fn write(&self, ram: &Ram, first: u64, pages: u64) {
        let next = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let address = (first + next % pages) * PAGE + (next * 8) % PAGE;
        ram.write_obj(next, GuestAddress(address)).unwrap();
    }
}

impl Vcpu {
    fn new(count: u64) -> Self {
        let shared = VcpuState {
            running: Arc::new(Mutex::new(true)),
            count: Arc::new(AtomicU64::new(count)),
            throttle: Arc::default(),
            writes: Arc::default(),
        };
        Self { shared, bystander: 0, thread: None }
    }

    fn start(&mut self, ram: &Ram, first: u64, pages: u64) {
        let (shared, ram) = (self.shared.clone(), ram.clone());
        shared.writes.store(true, Ordering::Relaxed);
        let quit = Arc::new(AtomicBool::new(false));
        let quits = quit.clone();
        let work = move || {
            while !quits.load(Ordering::Relaxed) {
                let runs = shared.running.lock().unwrap();
                if *runs {
                    shared.write(&ram, first, pages);
                }
                drop(runs);
                thread::sleep(STEP);
            }
        };
        self.thread = Some((thread::Builder::new().spawn(work).unwrap(), quit));
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        if let Some((thread, quit)) = self.thread.take() {
            quit.store(true, Ordering::Relaxed);
            thread.join().unwrap();
        }
    }
}

struct StopVcpu {
    running: Arc<Mutex<bool>>,
    world: Arc<World>,
}

impl Step for StopVcpu {
    fn name(&self) -> String {
        "stop 1 vCPU".into()
    }
    fn enter(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        *self.running.lock().unwrap() = false;
        self.world.here.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn undo(&mut self) {
        self.world.undone.fetch_add(1, Ordering::SeqCst);
        self.world.run(&self.world.here, &self.world.there);
        *self.running.lock().unwrap() = true;
    }
}

struct Stuck;

impl Step for Stuck {
    fn name(&self) -> String {
        "stop the stuck device".into()
    }
    fn enter(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        Err("it does not answer".into())
    }
    fn undo(&mut self) {
        panic!("it was never entered");
    }
}

struct FlushRelay(Ram);

impl Step for FlushRelay {
    fn name(&self) -> String {
        "flush the relay".into()
    }
    fn enter(&mut self, _: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        Ok(self.0.write_slice(b"relayed", GuestAddress(HIGH))?)
    }
    fn undo(&mut self) {}
}

pub(super) struct FakeGuest {
    pub(super) ram: Ram,
    vcpu: Vcpu,
    dirty: DirtySet,
    pub(super) plan: Plan,
    pub(super) devices: Vec<Device>,
    fault: Fault,
}

impl FakeGuest {
    pub(super) fn new(world: &Arc<World>, fault: Fault) -> Self {
        Self::with_memory(world, fault, LOW_PAGES)
    }

    pub(super) fn with_memory(world: &Arc<World>, fault: Fault, low_pages: u64) -> Self {
        Self::in_memory(world, fault, ram(low_pages))
    }

    pub(super) fn in_memory(world: &Arc<World>, fault: Fault, ram: Ram) -> Self {
        ram.write_slice(b"first", GuestAddress(PAGE + 7)).unwrap();
        ram.write_slice(&[7; 5000], GuestAddress(HIGH + PAGE)).unwrap();
        let vcpu = Vcpu::new(41);
        let dirty = behind(&vcpu.shared, OwnWrites::new(ram.clone()));
        let mut plan = Plan::new();
        let stop = StopVcpu { running: vcpu.shared.running.clone(), world: world.clone() };
        plan.at(Phase::Quiesce, Priority::VCPUS, stop);
        if fault == Fault::StuckDevice {
            plan.at(Phase::Quiesce, Priority::ASSIGNED, Stuck);
        }
        if fault == Fault::Relay {
            plan.at(Phase::Quiesce, Priority::RELAYS, FlushRelay(ram.clone()));
        }
        world.here.store(true, Ordering::SeqCst);
        Self { ram, vcpu, dirty, plan, devices: vec![], fault }
    }

    /// Keeps its dirty log until it is forgotten, which fails from the call `fails_at` on.
    pub(super) fn keep_a_ledger(&mut self, fails_at: Option<u32>) {
        self.dirty = behind(&self.vcpu.shared, Ledger::new(&self.ram, fails_at));
    }

    /// Lets its vCPU write `pages` pages from `first` on, over and over.
    pub(super) fn write_all_the_time(&mut self, first: u64, pages: u64) {
        self.vcpu.start(&self.ram, first, pages);
    }

    /// For how much of the time its vCPU is kept from running.
    pub(super) fn throttled(&self) -> u8 {
        self.vcpu.shared.throttle.load(Ordering::Relaxed)
    }

    /// For how much of the time a vCPU that writes nothing was kept from running, at most.
    pub(super) fn bystander_throttled(&self) -> u8 {
        self.vcpu.bystander
    }

    /// Lets its vCPU write all the time, and faster than it is sent; if it `tells`, which of its
    /// vCPUs wrote each page.
    pub(super) fn outrun(&mut self, tells: bool) {
        let busy = Busy::new(&self.ram, self.vcpu.shared.clone(), tells);
        self.dirty = DirtySet::new();
        self.dirty.add(busy);
    }

    pub(super) fn count(&self) -> u64 {
        self.vcpu.shared.count.load(Ordering::Relaxed)
    }
}

impl Departing for FakeGuest {
    fn prepare(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        meanwhile()
    }
    fn offer(&self) -> Offer {
        let profile = Profile::new().with("device", Rule::Eq, "lamp").with("cpus", Rule::Eq, 1);
        let profile = Format::of::<CounterV1>().written(profile);
        Offer { name: "fake".into(), config: vec![1, 2, 3], profile, ram: vec![] }
    }
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn dirty(&mut self) -> &mut DirtySet {
        &mut self.dirty
    }
    fn throttle(&mut self, shares: &Shares) {
        self.vcpu.shared.throttle.store(shares.of(0), Ordering::Relaxed);
        self.vcpu.bystander = self.vcpu.bystander.max(shares.of(1));
    }
    fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }
    fn save(&self, out: &mut StateWriter) -> Result<(), StateError> {
        if self.fault == Fault::LateWriter {
            self.ram.write_obj(1u8, GuestAddress(HIGH)).unwrap();
        }
        out.at("vcpu/0").put(&CounterV1 { count: self.count() })
    }
    fn state_size(&self) -> u64 {
        64
    }
    fn devices(&self) -> Vec<Device> {
        self.devices.clone()
    }
    fn is_back(&mut self, id: &str) {
        self.devices.iter_mut().filter(|device| device.id == id).for_each(|d| d.paused_ms = 1);
    }
}

#[derive(Clone)]
pub(super) struct FakeHost {
    pub(super) world: Arc<World>,
    pub(super) fault: Fault,
    pub(super) low_pages: u64,
}

pub(super) struct FakeArrival {
    pub(super) ram: Ram,
    pub(super) count: u64,
    host: FakeHost,
}

impl Host for FakeHost {
    type Guest = FakeArrival;

    fn prepare(
        &mut self,
        offer: &Offer,
        memory: Option<Vec<File>>,
    ) -> Result<FakeArrival, Vec<Mismatch>> {
        let device = if self.fault == Fault::Mismatch { "radio" } else { "lamp" };
        let have = Profile::new().with("device", Rule::Eq, device).with("cpus", Rule::Eq, 1);
        let have = match self.fault {
            Fault::OldFormat => have.with("state/counter", Rule::Subset, BTreeSet::from([0])),
            _ => Format::of::<CounterV1>().read(have),
        };
        agree(&offer.profile, &have)?;
        let ram = memory.map_or_else(|| ram(self.low_pages), |files| mapped(&files));
        Ok(FakeArrival { ram, count: 0, host: self.clone() })
    }
}

impl Arriving for FakeArrival {
    fn ram(&self) -> &Ram {
        &self.ram
    }
    fn load(&mut self, from: &mut StateReader<'_>) -> Result<(), StateError> {
        if self.host.fault == Fault::BadState {
            return Err(StateError::invalid::<CounterV1>("a guest can only count so far"));
        }
        let CounterV1 { count } = from.at("vcpu/0").take()?;
        self.count = count;
        Ok(())
    }
    fn run(&mut self) -> Result<(), StepFailure> {
        if self.host.fault == Fault::NoStart {
            return Err("no vCPU starts".into());
        }
        self.host.world.run(&self.host.world.there, &self.host.world.here);
        Ok(())
    }
}
