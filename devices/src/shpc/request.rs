//! What becomes of a wish to put a card in or to take one out, told from what the guest does.
//!
//! ```text
//! asked ── the power light blinks ──► accepted ── as wished ──► done
//!   │                                  │  │
//!   └─────────── as wished ────────────┘  ├─ attention light ──► refused
//!                                         └─ light as before ──► cancelled
//! ```

use super::slot::{Led, State, View};

/// What is wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A card is in; the guest shall use it.
    Plug,
    /// The guest shall let go of its card.
    Unplug,
}

/// How far the guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The button was pressed.
    Asked,
    /// The guest's driver heard it: it waits a while, so that the wish can be withdrawn, and works.
    Accepted,
    /// As wished: the card is in use, or the slot has no power.
    Done,
    /// The guest tried and could not.
    Refused,
    /// The guest let everything be as it was, as after a second press.
    Cancelled,
}

impl Progress {
    /// Whether nothing more will come of it.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Refused | Self::Cancelled)
    }

    /// What `wish` has come to, once the slot shows `view`.
    #[must_use]
    pub fn with(self, wish: Wish, view: View) -> Self {
        let on = (view.state, view.power) == (State::Enabled, Led::On);
        let off = (view.state, view.power) == (State::Disabled, Led::Off);
        let (fulfilled, as_before) = match wish {
            Wish::Plug => (on, off),
            Wish::Unplug => (off, on),
        };
        match self {
            done if done.is_final() => done,
            _ if fulfilled => Self::Done,
            _ if wish == Wish::Plug && off && view.attention == Led::On => Self::Refused,
            Self::Accepted if as_before => Self::Cancelled,
            _ if view.power == Led::Blink => Self::Accepted,
            same => same,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slot::Slot;
    use super::*;

    /// What comes of `wish` when the guest gives these slot operations to a slot with a card.
    fn outcome(wish: Wish, operations: &[u8]) -> Progress {
        let mut slot = Slot::new(wish == Wish::Unplug);
        slot.insert();
        operations.iter().fold(Progress::Asked, |progress, operation| {
            slot.operate(*operation).unwrap();
            progress.with(wish, slot.view())
        })
    }

    // The operations are those of Linux (drivers/pci/hotplug/shpchp_ctrl.c), in its order.

    #[test]
    fn a_card_that_the_guest_takes_is_plugged() {
        let linux = [0x08, 0x30, 0x01, 0x3a, 0x04];
        let stages = [Progress::Accepted; 4].into_iter().chain([Progress::Done]);
        for (count, stage) in (1..).zip(stages) {
            assert_eq!(outcome(Wish::Plug, &linux[..count]), stage, "after {count}");
        }
    }

    #[test]
    fn a_card_that_the_guest_cannot_use_is_refused() {
        assert_eq!(outcome(Wish::Plug, &[0x08, 0x30, 0x01, 0x3a, 0x1f]), Progress::Refused);
    }

    #[test]
    fn a_card_that_the_guest_lets_go_is_unplugged() {
        assert_eq!(outcome(Wish::Unplug, &[0x08, 0x30]), Progress::Accepted);
        assert_eq!(outcome(Wish::Unplug, &[0x08, 0x30, 0x1f]), Progress::Done);
        assert_eq!(outcome(Wish::Unplug, &[0x08, 0x30, 0x1f, 0x30]), Progress::Done);
        assert_eq!(outcome(Wish::Unplug, &[0x1f]), Progress::Done, "from within the guest");
    }

    #[test]
    fn a_light_as_before_is_a_cancelled_wish() {
        assert_eq!(outcome(Wish::Plug, &[0x08, 0x30, 0x0c, 0x30]), Progress::Cancelled);
        assert_eq!(outcome(Wish::Unplug, &[0x08, 0x30, 0x04, 0x30]), Progress::Cancelled);
        assert_eq!(outcome(Wish::Plug, &[0x30]), Progress::Asked, "it has not blinked yet");
    }
}
