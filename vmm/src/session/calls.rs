//! What the control socket asks for, and what a stay answers.

use std::mem;

use migration::handover::{GivingEvent, Verdict};

use super::{Ending, Next, Session, Tenant};
use crate::cause;
use crate::config::Address;
use crate::control::{
    Call, Decision, Info, MigrateRequest, Replier, Request, SnapshotRequest, State, StateDir,
    Undecided,
};
use crate::guest::{Leaving, Stays, Traits};
use crate::machine::{Machine, Seats};
use crate::migrate::{self, NotBegun};
use crate::snapshot;

impl Session {
    /// Answers `call`, at once or, a migration, when it is over.
    pub(super) fn answer(&mut self, call: Call) -> Next {
        let Call { request, reply } = call;
        match request {
            Request::Info {} => reply.finish(Ok(self.info())),
            Request::Pause {} => reply.finish(
                self.machine("pause")
                    .and_then(|machine| machine.pause().map_err(|error| cause::chain(&error))),
            ),
            Request::Resume {} => reply.finish(
                self.machine("resume")
                    .and_then(|machine| machine.resume().map_err(|error| cause::chain(&error))),
            ),
            Request::Stop { force: true } => {
                reply.finish(Ok(()));
                return self.next_unless_leaving(Next::End(Ending::Quit));
            }
            Request::Stop { force: false } => return self.stop(reply),
            Request::Migrate(request) => self.migrate(request, reply),
            Request::Snapshot(request) => self.snapshot(request, reply),
            Request::Cancel {} => reply.finish(self.cancel()),
            Request::Resolve { decision } => return self.resolve(decision, reply),
            Request::Plug { device, timeout_ms } => self.plug(device, timeout_ms, reply),
            Request::Unplug { id, timeout_ms } => self.unplug(&id, timeout_ms, reply),
        }
        Next::Stay
    }

    fn info(&self) -> Info {
        let machine = match &self.tenant {
            Tenant::Here(machine) => Some(machine),
            _ => None,
        };
        let (state, underway, incoming) = match &self.tenant {
            Tenant::Here(machine) if machine.is_running() => (State::Running, None, None),
            Tenant::Here(_) | Tenant::Between => (State::Paused, None, None),
            Tenant::Leaving { underway, .. } => (State::Migrating, Some(underway), None),
            Tenant::Arriving { underway, at } => (State::Incoming, Some(underway), at.as_ref()),
            Tenant::Undecided { .. } => (State::Undecided, None, None),
        };
        Info {
            name: self.claim.name().clone(),
            state,
            cpus: self.shape.cpus,
            cpu: self.shape.cpu.to_string(),
            memory: self.shape.memory,
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            serial: self.config.serial.clone(),
            incoming: incoming.cloned(),
            migration: underway.map(|underway| underway.progress()),
            slots: self.slots(),
            counters: machine.map(|machine| machine.counters()).unwrap_or_default(),
        }
    }

    /// The machine, if it is here to do `what` with.
    pub(super) fn machine(&mut self, what: &str) -> Result<&mut Machine, String> {
        match &mut self.tenant {
            Tenant::Here(machine) => Ok(machine),
            Tenant::Leaving { .. } => Err(format!(
                "cannot {what} a guest that is being migrated or written: cancel that first"
            )),
            Tenant::Arriving { .. } => {
                Err(format!("there is no guest to {what}: none has arrived yet"))
            }
            Tenant::Undecided { .. } => {
                Err(format!("cannot {what} a guest that may run elsewhere: see 'uvmm resolve'"))
            }
            Tenant::Between => Err(format!("there is no guest to {what}")),
        }
    }

    /// Asks the guest to switch itself off; what waits for a guest just ends.
    fn stop(&mut self, reply: Replier) -> Next {
        if let Tenant::Arriving { underway, .. } = &self.tenant {
            underway.cancel.cancel();
            reply.finish(Ok(()));
            return Next::Stay;
        }
        reply.finish(self.machine("stop").and_then(|machine| {
            if !machine.is_running() {
                return Err("a paused guest does not see its power button: resume it first, or \
                            use --force"
                    .to_owned());
            }
            machine.host_ends().pm.press_power_button();
            Ok(())
        }));
        Next::Stay
    }

    fn migrate(&mut self, request: MigrateRequest, reply: Replier) {
        let fit =
            self.nothing_is_plugged().and_then(|()| match (&request.to, request.shared_memory) {
                (_, false) => self.machine("migrate").map(|_| ()),
                (Address::Unix(_), true) => self.without_devices("hand over its memory"),
                (Address::Tcp { .. }, true) => {
                    Err("memory can be shared only on this host: give --to unix:PATH".to_owned())
                }
            });
        let record = fit.and_then(|()| {
            let peer = request.to.to_string();
            let record = StateDir::find().and_then(|dir| dir.record(self.claim.name(), peer));
            record.map_err(|error| cause::chain(&error))
        });
        let record = match record {
            Ok(record) => record,
            Err(error) => return reply.finish::<()>(Err(error)),
        };
        let (guest, seats) = match self.let_go() {
            Ok(leaving) => leaving,
            Err(error) => return reply.finish::<()>(Err(error)),
        };
        let events = self.host.events.clone();
        self.tenant = match migrate::depart(guest, request, reply, record, events) {
            Ok(underway) => Tenant::Leaving { underway, seats, after: Next::Stay },
            Err(not_begun) => {
                let NotBegun { guest, reply, error } = *not_begun;
                reply.finish::<()>(Err(format!("cannot start a thread: {error}")));
                self.stays(guest)
            }
        };
    }

    fn snapshot(&mut self, request: SnapshotRequest, reply: Replier) {
        let fit = self.nothing_is_plugged().and_then(|()| self.without_devices("be written"));
        let (guest, seats) = match fit.and_then(|()| self.let_go()) {
            Ok(leaving) => leaving,
            Err(error) => return reply.finish::<()>(Err(error)),
        };
        let (file, events) = (request.file.display().to_string(), self.host.events.clone());
        self.tenant = match snapshot::write(guest, request, reply, events) {
            Ok(underway) => Tenant::Leaving { underway, seats, after: Next::Stay },
            Err(not_begun) => {
                let NotBegun { guest, reply, error } = *not_begun;
                reply.finish::<()>(Err(format!("cannot write {file}: {error}")));
                self.stays(guest)
            }
        };
    }

    /// Checks that there is a guest, and that it has no device of the host.
    fn without_devices(&mut self, what: &str) -> Result<(), String> {
        let machine = self.machine(what)?;
        let ids: Vec<_> = machine.assigned().ids().map(ToString::to_string).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let all = ids.join(", ");
        Err(format!(
            "a guest cannot {what} with devices of the host, and it has {all}: take them from it \
             with `uvmm unplug`"
        ))
    }

    /// Takes the machine, which is here, for a guest on its way out.
    fn let_go(&mut self) -> Result<(Leaving, Option<Seats>), String> {
        let Tenant::Here(machine) = mem::replace(&mut self.tenant, Tenant::Between) else {
            unreachable!("the machine is here")
        };
        let seats = machine.seats();
        let traits = Traits {
            name: self.claim.name().clone(),
            built_in: self.boot.as_ref().is_some_and(|boot| boot.kernel.is_none()),
            bounces: self.bounces,
            devices: self.host.devices.clone(),
        };
        Leaving::new(*machine, traits).map(|guest| (guest, seats)).map_err(
            |Stays { machine, error }| {
                self.tenant = Tenant::Here(machine);
                cause::chain(&error)
            },
        )
    }

    /// A guest that did not leave, with the devices that it still has.
    pub(super) fn stays(&mut self, guest: Leaving) -> Tenant {
        let (machine, lost) = guest.into_machine();
        self.host.devices.retain(|device| !lost.contains(&device.id));
        Tenant::Here(Box::new(machine))
    }

    fn cancel(&mut self) -> Result<(), String> {
        match &self.tenant {
            Tenant::Leaving { underway, .. } | Tenant::Arriving { underway, .. } => {
                underway.cancel.cancel();
                Ok(())
            }
            _ => Err("no migration is under way".to_owned()),
        }
    }

    fn resolve(&mut self, decision: Option<Decision>, reply: Replier) -> Next {
        let Tenant::Undecided { what, since, .. } = &self.tenant else {
            let none = "there is nothing to resolve: no migration is undecided";
            reply.finish(if decision.is_none() { Ok(()) } else { Err(none.to_owned()) });
            return Next::Stay;
        };
        match decision {
            None => {
                let stopped_s = since.elapsed().as_secs();
                reply.finish(Ok(Undecided { stopped_s, ..what.clone() }));
                Next::Stay
            }
            Some(decision) => self.decide(decision, reply),
        }
    }

    /// Takes the word of a person, or of the destination, about an undecided migration. A guest
    /// that goes on here takes its time: its devices are resumed, or plugged in again.
    fn decide(&mut self, decision: Decision, reply: Replier) -> Next {
        let Tenant::Undecided { handover, .. } = &mut self.tenant else {
            return Next::Stay;
        };
        let verdict = match decision {
            Decision::RunHere => Verdict::Refused,
            Decision::Discard => Verdict::Running,
        };
        if let Err(error) = handover.advance(GivingEvent::Heard(verdict)) {
            tracing::warn!(%error, "cannot write down what was decided");
        }
        handover.settle();
        reply.finish(Ok(()));
        if !handover.state().may_run() {
            return Next::End(Ending::Quit);
        }
        if let Tenant::Undecided { guest, .. } = mem::replace(&mut self.tenant, Tenant::Between) {
            let seats = guest.seats();
            let underway = migrate::take_back(guest, self.host.events.clone());
            self.tenant = Tenant::Leaving { underway, seats, after: Next::Stay };
        }
        Next::Stay
    }

    /// A guest runs here again, after all.
    pub(super) fn taken_back(&mut self, guest: Leaving) -> Next {
        let Tenant::Leaving { after, .. } = mem::replace(&mut self.tenant, Tenant::Between) else {
            unreachable!("it was leaving until then")
        };
        self.stay(guest, after)
    }
}
