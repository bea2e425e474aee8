//! Waiting for what the guest says in the migration block of its bridge.

use std::time::{Duration, Instant};

use devices::pci::bridge::BlockView;
use devices::shpc::Slots;

/// How long it takes at most to notice that nobody waits any more.
const TICK: Duration = Duration::from_millis(20);

/// Waits until `done` holds of the block: whether it does before `deadline`. Asks now and then
/// whether to go on, and stops with the error if not.
pub(crate) fn wait_until<E>(
    slots: &Slots,
    deadline: Instant,
    done: impl Fn(&BlockView) -> bool,
    mut go_on: impl FnMut() -> Result<(), E>,
) -> Result<bool, E> {
    loop {
        let seen = slots.changes();
        if done(&slots.block()) {
            return Ok(true);
        }
        let now = Instant::now();
        if now >= deadline {
            return Ok(false);
        }
        go_on()?;
        let _ = slots.wait(seen, deadline.min(now + TICK));
    }
}
