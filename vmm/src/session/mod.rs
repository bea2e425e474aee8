//! `uvmm run`: one guest's stay on this host, from its start or arrival to its end or departure.

mod alarm;
mod attention;
mod calls;
mod error;
mod homecoming;
mod hotplug;
mod seat;

use std::mem;
use std::path::PathBuf;
use std::time::Instant;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use migration::handover::{Giving, Handover};
use migration::{Answering, Homecoming};

use alarm::AlarmClock;
pub(crate) use error::Error;
use seat::Seat;

use crate::config::{Address, Boot, DeviceConfig, MachineConfig, RunConfig, VmName};
use crate::console::Console;
use crate::control::{
    Call, Claim, Request, RuntimeDir, Server, StateDir, StateDirError, Undecided,
};
use crate::event::{self, Event, Wake};
use crate::guest::{Builder, Leaving, Settler};
use crate::hotplug::Underway as Plugging;
use crate::machine::{Alarm, HostSide, Machine, Seats};
use crate::migrate::{self, Arrival, Departure, Outcome, Underway};
use crate::signals::Signals;
use crate::snapshot::{self, Restored, Snapped};
use crate::vcpu::block_kicks;

/// How a stay ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The guest switched itself off.
    Off,
    /// The user ended it.
    Quit,
    /// The process got this signal.
    Signal(i32),
    /// The guest runs on another host.
    Migrated,
    /// The guest cannot go on: a triple fault, an error of KVM.
    Died(String),
}

/// Starts what `config` says, or waits for it to arrive, and stays with it to its end.
///
/// # Errors
/// There is no guest: it could not be started, or none arrived.
pub(crate) fn run(config: RunConfig) -> Result<Ending, Error> {
    // Before any thread is started: they inherit it.
    block_kicks().map_err(Error::Signals)?;
    let claim = RuntimeDir::open()?.claim(config.name.as_ref())?;
    if config.incoming.is_none() {
        // Whether the name was given or found: who gave none the last time gives none again.
        allow_boot(claim.name())?;
    }
    let (events, queue) = event::queue().map_err(Error::Events)?;
    let console = Console::open(&config.serial)?;
    let host = HostSide {
        hugepages: config.hugepages,
        dirty_tracking: config.dirty_tracking,
        devices: config.devices.clone(),
        output: console.output(),
        room: console.room(),
        alarm: Alarm::new().map_err(Error::Events)?,
        events,
    };
    let seat = Seat::default();
    let mut manager = subscribe(&claim, console, &seat, &host, queue.wake())?;
    let mut session = Session::start(config, claim, host, seat)?;
    loop {
        while let Some(event) = queue.next() {
            if let Some(ending) = session.act(event)? {
                return Ok(session.end(ending));
            }
        }
        manager.run().map_err(Error::EventLoop)?;
    }
}

/// A guest that was given away and may run elsewhere is not booted a second time.
fn allow_boot(name: &VmName) -> Result<(), StateDirError> {
    match StateDir::find() {
        Err(StateDirError::Nowhere) => Ok(()), // then nothing was ever given away from here
        found => found?.allow_boot(name),
    }
}

type Subscriber = Box<dyn MutEventSubscriber>;

/// Makes an event of everything that this process is told from outside.
fn subscribe(
    claim: &Claim,
    console: Console,
    seat: &Seat,
    host: &HostSide,
    wake: &Wake,
) -> Result<EventManager<Subscriber>, Error> {
    let mut manager = EventManager::<Subscriber>::new().map_err(Error::EventLoop)?;
    let events = || host.events.clone();
    let (calls, quits, signals) = (events(), events(), events());
    let alarm = AlarmClock::new(seat.clone(), host.alarm.clone()).map_err(Error::Events)?;
    let seat = seat.clone();
    let subscribers: [Subscriber; 5] = [
        Box::new(alarm),
        Box::new(wake.clone()),
        Box::new(Server::new(claim, move |call| calls.send(Event::Call(call)))?),
        Box::new(
            Signals::new(move |signal| signals.send(Event::Signal(signal)))
                .map_err(Error::Events)?,
        ),
        Box::new(console.attach(move |bytes| seat.type_in(bytes), move || quits.send(Event::Quit))),
    ];
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    Ok(manager)
}

/// A stay, with all that outlives the machines in it.
struct Session {
    config: RunConfig,
    claim: Claim,
    host: HostSide,
    seat: Seat,
    started: Instant,
    /// The machine as it was asked for, or as it arrived.
    shape: MachineConfig,
    tenant: Tenant,
    /// What a guest boots from that asks for a reset; none if it came without that.
    boot: Option<Boot>,
    /// Whether the guest that is here bounces all DMA.
    bounces: bool,
    /// What happened to a guest that runs here before this was told that it does.
    early: Vec<Event>,
    /// Still tells the source of a guest that arrived that it runs here.
    answering: Option<Answering>,
    /// Devices on their way into the machine that is here, or out of it.
    plugging: Vec<Plugging>,
    /// How many there have been.
    orders: u64,
    /// Those that a guest arrived without and has not got back yet.
    owed: Vec<DeviceConfig>,
}

/// Where the guest is.
enum Tenant {
    /// Here.
    Here(Box<Machine>),
    /// On its way out, or into a file; its machine is with the migration. `after` is what comes next if it does
    /// not get away.
    Leaving { underway: Underway, seats: Option<Seats>, after: Next },
    /// On its way in: awaited at this address, or read from a file.
    Arriving { underway: Underway, at: Option<Address> },
    /// Here and standing still, since nobody knows whether it runs elsewhere.
    Undecided {
        guest: Box<Leaving>,
        what: Undecided,
        since: Instant,
        handover: Box<Handover<Giving>>,
    },
    /// Nowhere: only while one of the others takes the place of another.
    Between,
}

/// What an event leads to.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The stay goes on.
    Stay,
    /// The guest boots again.
    Boot,
    /// The stay ends.
    End(Ending),
}

impl Session {
    fn start(config: RunConfig, claim: Claim, host: HostSide, seat: Seat) -> Result<Self, Error> {
        let mut session = Self {
            boot: Some(config.boot.clone()),
            shape: config.machine.clone(),
            config,
            claim,
            host,
            seat,
            started: Instant::now(),
            tenant: Tenant::Between,
            bounces: false,
            early: Vec::new(),
            answering: None,
            plugging: Vec::new(),
            orders: 0,
            owed: Vec::new(),
        };
        match (session.config.incoming.clone(), session.config.restore.clone()) {
            (None, None) => session.boot()?,
            (None, Some(path)) => session.restore(path)?,
            (Some(address), _) => session.await_guest(address)?,
        }
        Ok(session)
    }

    /// Starts the guest afresh.
    fn boot(&mut self) -> Result<(), Error> {
        let owed = mem::take(&mut self.owed);
        self.stop_plugging();
        let has = |device: &DeviceConfig| self.host.devices.iter().any(|had| had.id == device.id);
        let owed: Vec<_> = owed.into_iter().filter(|device| !has(device)).collect();
        self.host.devices.extend(owed);
        // The old machine's RAM is given back before the new one's is taken.
        self.tenant = Tenant::Between;
        let boot = self.boot.as_ref().ok_or(Error::NothingToBoot)?;
        self.bounces = boot.bounces_dma();
        let mut machine = Machine::booted(&self.shape, boot, &self.host)?;
        self.seat(&machine);
        machine.resume()?;
        self.tenant = Tenant::Here(Box::new(machine));
        Ok(())
    }

    /// Turns the console and the host's clock to `machine`.
    fn seat(&self, machine: &Machine) {
        self.seat.take(machine);
        self.host.alarm.ring();
        // What was typed before it was here waits.
        self.host.room.notify();
    }

    fn await_guest(&mut self, address: Address) -> Result<(), Error> {
        let builder = Builder::new(self.host.clone());
        let record = StateDir::find()?.record(self.claim.name(), address.to_string())?;
        let events = self.host.events.clone();
        let (underway, at) = migrate::await_arrival(&address, builder, record, events)
            .map_err(|source| Error::Incoming { at: address, source })?;
        tracing::info!(%at, "waiting for a guest");
        self.tenant = Tenant::Arriving { underway, at: Some(at) };
        Ok(())
    }

    fn restore(&mut self, path: PathBuf) -> Result<(), Error> {
        let (builder, events) = (Builder::new(self.host.clone()), self.host.events.clone());
        let underway = snapshot::read(&path, builder, events)
            .map_err(|source| Error::Snapshot { path, source })?;
        self.tenant = Tenant::Arriving { underway, at: None };
        Ok(())
    }

    /// Acts on `event`; tells the ending if it leads to one.
    fn act(&mut self, event: Event) -> Result<Option<Ending>, Error> {
        if self.is_early(&event) {
            self.early.push(event);
            return Ok(None);
        }
        let next = match event {
            Event::Call(call) => self.answer(call),
            Event::Off => self.next_unless_leaving(Next::End(Ending::Off)),
            Event::Reset => self.next_unless_leaving(Next::Boot),
            Event::Died { vcpu, why } => {
                let why = format!("vCPU {vcpu}: {why}");
                self.next_unless_leaving(Next::End(Ending::Died(why)))
            }
            Event::Signal(signal) => self.next_unless_leaving(Next::End(Ending::Signal(signal))),
            Event::Quit => self.next_unless_leaving(Next::End(Ending::Quit)),
            Event::Departed(departure) => self.departed(*departure),
            Event::Arrived(arrival) => self.arrived(*arrival)?,
            Event::Snapped(snapped) => self.snapped(*snapped),
            Event::Restored(restored) => self.restored(*restored)?,
            Event::TakenBack(guest) => self.taken_back(*guest),
            Event::DeviceWanted(id) => self.device_wanted(&id),
            Event::DeviceFailed(id) => self.device_failed(&id),
            Event::Plugged(serial) => self.plugged(serial),
        };
        match next {
            Next::Stay => Ok(None),
            Next::Boot => self.boot().map(|()| None),
            Next::End(ending) => Ok(Some(ending)),
        }
    }

    /// Whether `event` is for a guest that runs here, and whose machine is still with the migration
    /// that brought it: the source hears first that it arrived, and a guest can be quick.
    fn is_early(&self, event: &Event) -> bool {
        match event {
            Event::Call(Call { request: Request::Stop { force: true }, .. }) => false,
            Event::Call(_) | Event::Off | Event::Reset | Event::Died { .. } => {
                matches!(&self.tenant, Tenant::Arriving { underway, .. } if underway.runs.get())
            }
            _ => false,
        }
    }

    /// `next`, now or once a migration under way has come to its own end.
    fn next_unless_leaving(&mut self, next: Next) -> Next {
        match &mut self.tenant {
            Tenant::Leaving { underway, after, .. } => {
                underway.cancel.cancel();
                // What the user wants comes before what the guest wants, and of that the first.
                let by_user = matches!(next, Next::End(Ending::Quit | Ending::Signal(_)));
                if by_user || *after == Next::Stay {
                    *after = next;
                }
                Next::Stay
            }
            _ => next,
        }
    }

    fn departed(&mut self, departure: Departure) -> Next {
        let Tenant::Leaving { after, .. } = mem::replace(&mut self.tenant, Tenant::Between) else {
            unreachable!("a departure ends the leaving that it began with")
        };
        let stopped = Instant::now();
        let (outcome, guest) = departure.conclude();
        match outcome {
            Outcome::Gone => return Next::End(Ending::Migrated),
            Outcome::Stayed => {
                return self.stay(guest, after);
            }
            Outcome::Undecided(what, handover) => {
                let guest = Box::new(guest);
                self.tenant = Tenant::Undecided { guest, what, since: stopped, handover };
            }
        }
        after
    }

    /// A guest goes on here; gives what comes next.
    fn stay(&mut self, guest: Leaving, next: Next) -> Next {
        let given = self.host.devices.clone();
        self.tenant = self.stays(guest);
        // A guest that boots again gets what the user gave it.
        if next == Next::Boot {
            self.host.devices = given;
        }
        next
    }

    fn arrived(&mut self, arrival: Arrival) -> Result<Next, Error> {
        for event in mem::take(&mut self.early) {
            self.host.events.send(event);
        }
        match arrival {
            Ok(arrived) => {
                self.answering = Some(arrived.answering);
                self.settle(arrived.guest.settle(), arrived.homecoming);
                Ok(Next::Stay)
            }
            Err(failure) => {
                self.answering = failure.answering;
                self.wait_for_source();
                // Whoever cancelled a wait wanted the end.
                match failure.error {
                    migration::Error::Cancelled => Ok(Next::End(Ending::Quit)),
                    error => Err(Error::Arrival(error)),
                }
            }
        }
    }

    fn snapped(&mut self, snapped: Snapped) -> Next {
        let Tenant::Leaving { after, .. } = mem::replace(&mut self.tenant, Tenant::Between) else {
            unreachable!("a snapshot ends the leaving that it began with")
        };
        let (guest, goes_on) = snapped.conclude();
        if !goes_on {
            return Next::End(Ending::Quit);
        }
        self.tenant = self.stays(guest);
        after
    }

    fn restored(&mut self, restored: Restored) -> Result<Next, Error> {
        match restored {
            Ok(guest) => {
                self.settle(guest.settle(), Homecoming::unheard());
                Ok(Next::Stay)
            }
            // Whoever cancelled it wanted the end.
            Err(failure) => match failure.error {
                migration::Error::Cancelled => Ok(Next::End(Ending::Quit)),
                error => Err(Error::Restore(error)),
            },
        }
    }

    /// A guest is here to stay: it gets back the devices that it had to do without.
    fn settle(&mut self, settler: Settler, homecoming: Homecoming) {
        let Settler { machine, built_in, bounces, devices } = settler;
        let local = self.config.boot.kernel.is_some();
        self.boot = (local || built_in).then(|| self.config.boot.clone());
        self.bounces = bounces;
        self.shape = machine.config().clone();
        self.seat(&machine);
        self.tenant = Tenant::Here(Box::new(machine));
        self.bring_home(devices, homecoming);
    }

    /// Ends the stay.
    fn end(mut self, ending: Ending) -> Ending {
        self.stop_plugging();
        self.seat.leave();
        self.tenant = Tenant::Between;
        self.wait_for_source();
        ending
    }

    /// A source that nobody answers would not know whether it may resume the guest.
    fn wait_for_source(&mut self) {
        if let Some(answering) = self.answering.take() {
            answering.wait();
        }
    }
}
