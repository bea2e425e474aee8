//! Guests that have to let go of devices on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::fake::{FakeGuest, FakeHost, Fault, World};
use super::journeys::{Tried, options, patience, try_moving};
use super::network::{Limits, Network};
use crate::patience::Patience;
use crate::plan::{Meanwhile, Phase, Priority, Step, StepFailure};
use crate::report::Device;
use crate::source::Options;

/// A device that its guest takes `long` to let go of.
struct LetGo {
    long: Duration,
    fails: bool,
    gone: Arc<AtomicBool>,
}

impl Step for LetGo {
    fn name(&self) -> String {
        "unplug net0".into()
    }
    fn enter(&mut self, meanwhile: &mut Meanwhile<'_>) -> Result<(), StepFailure> {
        let end = Instant::now() + self.long;
        while Instant::now() < end {
            meanwhile()?;
            thread::sleep(Duration::from_millis(5));
        }
        if self.fails {
            return Err("the guest keeps it".into());
        }
        self.gone.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn took_long(&self) -> bool {
        true
    }
    fn undo(&mut self) {
        self.gone.store(false, Ordering::SeqCst);
    }
}

fn try_with(phase: Phase, fails: bool, fault: Fault) -> (Tried, bool) {
    let world = Arc::<World>::default();
    let mut guest = FakeGuest::with_memory(&world, fault, 700);
    guest.write_all_the_time(300, 300);
    let gone = Arc::<AtomicBool>::default();
    let long = Duration::from_millis(2500);
    guest.plan.at(phase, Priority::EVICT, LetGo { long, fails, gone: gone.clone() });
    guest.devices = vec![Device { id: "net0".into(), strategy: "evict".into(), paused_ms: 0 }];
    let host = FakeHost { world: world.clone(), fault, low_pages: 700 };
    let network = Network::new(Limits::NONE, Some(Limits::NONE));
    let short = Patience { silence: Duration::from_millis(1500), ..patience() };
    let options = Options { patience: short, ..options() };
    let tried = try_moving(world, guest, host, network, &options);
    let gone = gone.load(Ordering::SeqCst);
    (tried, gone)
}

#[test]
fn a_peer_waits_for_a_guest_that_lets_go_slowly() {
    for phase in [Phase::Precopy, Phase::Release] {
        let (tried, gone) = try_with(phase, false, Fault::None);
        tried.assert_there();
        assert!(gone);
        let report = tried.sent.unwrap();
        assert_eq!(report.devices[0].paused_ms, 1, "it was told that the device is back");
        assert!(report.downtime_ms < 2000, "letting go is no downtime: {}", report.downtime_ms);
    }
}

#[test]
fn a_guest_that_keeps_a_device_stays_as_it_was() {
    let (tried, gone) = try_with(Phase::Release, true, Fault::None);
    assert_eq!(tried.world.runners(), (true, false));
    assert!(tried.error().contains("cannot unplug net0: the guest keeps it"), "{}", tried.error());
    assert!(!gone);
}

#[test]
fn a_guest_that_comes_back_has_its_devices_back() {
    for fault in [Fault::StuckDevice, Fault::BadState, Fault::NoStart] {
        let (tried, gone) = try_with(Phase::Release, false, fault);
        assert_eq!(tried.world.runners(), (true, false), "{fault:?}");
        assert!(!gone, "{fault:?}");
    }
}
