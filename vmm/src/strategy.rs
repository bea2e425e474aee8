//! How each assigned device gets through a migration, chosen from what its guest can do.
//!
//! | what the guest does | how the device moves |
//! |---|---|
//! | its bridge driver promises dirtying and can pause | it works until the end, is paused, and resumes there |
//! | it promises dirtying, or bounces all DMA | it works while memory is copied, is unplugged, and plugged in there |
//! | nothing but hot-plug | it is unplugged before memory is copied, and plugged in there |
//! | not even that | the guest stays |

mod dirtying;
mod evict;
mod moving;
mod pause;

pub(crate) use dirtying::WantDirtying;
pub(crate) use evict::Evict;
pub(crate) use moving::Moving;
pub(crate) use pause::{Pause, StayPaused};

use crate::config::{DeviceConfig, DeviceId, Strategy};

/// How a device moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Paused by the guest at the end.
    Pause,
    /// Unplugged after memory was copied.
    EvictLate,
    /// Unplugged before memory is copied.
    EvictEarly,
}

impl Way {
    /// The strategy's name, for reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::EvictLate | Self::EvictEarly => "evict",
        }
    }
}

/// What a guest can do, as far as it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// It runs.
    pub(crate) runs: bool,
    /// Its hot-plug driver listens at the slot.
    pub(crate) hears_button: bool,
    /// It promised to write whatever the devices below the bridge write.
    pub(crate) dirties: bool,
    /// It was started with all DMA bounced by a CPU (Linux: `swiotlb=force`).
    pub(crate) bounces: bool,
    /// It can pause every device below the bridge.
    pub(crate) pauses: bool,
}

/// How a device moves, and why so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) way: Way,
    pub(crate) why: &'static str,
    /// What would make a better way possible.
    pub(crate) better: Option<&'static str>,
}

/// Why a guest stays because of a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the device {id} cannot be moved: {why}")]
pub(crate) struct Unmovable {
    id: DeviceId,
    why: &'static str,
}

const LOAD_DRIVER: &str =
    "load the guest driver of the bridge before the device's own, and it works until the end";
const NEEDS_SUSPEND: &str =
    "a driver in the guest that can suspend each device below the bridge would allow a pause";
const ASKED_EVICT: &str = "leave strategy= out, and the guest is asked to pause it";

/// How `device` moves with a guest that can do what `abilities` tells.
pub(crate) fn choose(device: &DeviceConfig, abilities: Abilities) -> Result<Choice, Unmovable> {
    let Abilities { runs, hears_button, dirties, bounces, pauses } = abilities;
    let fail = |why| Err(Unmovable { id: device.id.clone(), why });
    let can_pause = dirties && pauses;
    let evict = |why: [&'static str; 3], better| {
        let (way, why) = match (dirties, bounces) {
            (true, _) => (Way::EvictLate, why[0]),
            (false, true) => (Way::EvictLate, why[1]),
            (false, false) => (Way::EvictEarly, why[2]),
        };
        Ok(Choice { way, why, better })
    };
    match device.strategy {
        Strategy::Refuse => fail("strategy=refuse says so: unplug it first"),
        Strategy::Native => {
            fail("it offers no migration of its own: leave strategy= out for the best it can do")
        }
        _ if !runs => fail("a paused guest cannot let go of it: resume the guest first"),
        Strategy::Pause if !dirties => fail(
            "strategy=pause needs a guest that promises to dirty what the device writes: load the \
             guest driver of the bridge",
        ),
        Strategy::Pause if !pauses => {
            fail("strategy=pause needs a driver in the guest that can suspend the device")
        }
        Strategy::Auto | Strategy::Pause if can_pause => Ok(Choice {
            way: Way::Pause,
            why: "the guest tells what the device writes, and its driver can pause it",
            better: None,
        }),
        _ if !hears_button => fail(
            "the guest can neither pause it nor let go of it: it has no driver for hot-plug \
             (Linux: CONFIG_HOTPLUG_PCI_SHPC), or has not booted yet",
        ),
        Strategy::Evict => evict(
            [
                "strategy=evict; the guest tells what the device writes, so it may work longer",
                "strategy=evict; the guest bounces all DMA, so it may work longer",
                "strategy=evict; the guest does not tell what the device writes",
            ],
            if can_pause { Some(ASKED_EVICT) } else { Some(LOAD_DRIVER) },
        ),
        Strategy::Auto | Strategy::Pause => evict(
            [
                "the guest tells what the device writes, but cannot pause it",
                "the guest bounces all DMA, so its memory shows what the device writes",
                "the guest does not tell what the device writes",
            ],
            Some(if dirties { NEEDS_SUSPEND } else { LOAD_DRIVER }),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: Abilities =
        Abilities { runs: true, hears_button: true, dirties: false, bounces: false, pauses: false };
    const DRIVER: Abilities = Abilities { dirties: true, pauses: true, ..STOCK };

    fn way(strategy: &str, abilities: Abilities) -> Result<Way, String> {
        let device = format!("vfio,id=net0,host=01:10.0,strategy={strategy}");
        let device = device.parse().expect("it is well-formed");
        choose(&device, abilities).map(|c| c.way).map_err(|e| e.to_string())
    }

    #[test]
    fn the_best_way_that_the_guest_allows_is_taken() {
        for (abilities, expected) in [
            (DRIVER, Way::Pause),
            (Abilities { hears_button: false, ..DRIVER }, Way::Pause),
            (Abilities { pauses: false, ..DRIVER }, Way::EvictLate),
            (Abilities { bounces: true, ..STOCK }, Way::EvictLate),
            (Abilities { pauses: true, ..STOCK }, Way::EvictEarly),
            (STOCK, Way::EvictEarly),
        ] {
            assert_eq!(way("auto", abilities), Ok(expected), "{abilities:?}");
        }
    }

    #[test]
    fn the_user_may_choose_less() {
        assert_eq!(way("evict", DRIVER), Ok(Way::EvictLate));
        assert_eq!(way("evict", STOCK), Ok(Way::EvictEarly));
        assert_eq!(way("pause", DRIVER), Ok(Way::Pause));
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_to_do() {
        for (strategy, abilities, remedy) in [
            ("refuse", DRIVER, "unplug it first"),
            ("native", DRIVER, "leave strategy= out"),
            ("auto", Abilities { runs: false, ..DRIVER }, "resume the guest first"),
            ("pause", STOCK, "load the guest driver"),
            ("pause", Abilities { pauses: false, ..DRIVER }, "can suspend the device"),
            ("auto", Abilities { hears_button: false, ..STOCK }, "no driver for hot-plug"),
        ] {
            let error = way(strategy, abilities).unwrap_err();
            assert!(error.contains("net0") && error.contains(remedy), "{error}");
        }
    }
}
