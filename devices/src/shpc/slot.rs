//! One slot: its power, its lights, its card, and what it has to tell (SHPC 1.0, 4.9).

use super::registers::low_byte;

/// Whether a card is powered and on the bus (SHPC 1.0, table 4-15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Powered, but isolated from the bus and held in reset.
    PoweredOnly = 1,
    /// Powered and on the bus.
    Enabled = 2,
    /// Neither.
    Disabled = 3,
}

/// What a light of a slot shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Led {
    /// It shines.
    On = 1,
    /// It blinks.
    Blink = 2,
    /// It is dark.
    Off = 3,
}

impl State {
    fn of(bits: u32) -> Option<Self> {
        [Self::PoweredOnly, Self::Enabled, Self::Disabled].into_iter().find(|s| *s as u32 == bits)
    }
}

impl Led {
    fn of(bits: u32) -> Option<Self> {
        [Self::On, Self::Blink, Self::Off].into_iter().find(|led| *led as u32 == bits)
    }
}

/// What anybody who looks at a slot sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Power and bus.
    pub state: State,
    /// The green light: blinking asks to touch nothing.
    pub power: Led,
    /// The amber light: shining tells of an error.
    pub attention: Led,
    /// Whether there is a card.
    pub card: bool,
}

/// Why a slot refuses a command: the bit of the command status register (table 4-13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The latch that holds the card is open.
    MrlOpen = 1 << 1,
    /// No such command, or not in this state.
    Invalid = 1 << 2,
    /// The bus cannot run at that speed.
    Speed = 1 << 3,
}

// The fields of the logical slot register (table 4-15).
const POWER: u32 = 2;
const ATTENTION: u32 = 4;
const MRL_OPEN: u32 = 1 << 8;
const PRESENCE: u32 = 10;
/// A card of up to 7.5 W.
const CARD: u32 = 0;
const EMPTY: u32 = 3;
const LATCHES: u32 = 16;
const MASKS: u32 = 24;
/// Five for interrupts, two for system errors.
const ALL_MASKS: u32 = 0x7f << MASKS;
const ALL_LATCHES: u32 = 0x1f << LATCHES;
const RESERVED: u32 = 1 << 15 | 7 << 21 | 1 << 31;

/// What changed since the guest looked last, by bit; the interrupt masks have the same order.
mod latch {
    pub(super) const PRESENCE: u8 = 1 << 0;
    pub(super) const BUTTON: u8 = 1 << 2;
    pub(super) const MRL: u8 = 1 << 3;
    pub(super) const ALL: u8 = 0x1f;
}

/// A slot with an attention button and a sensor at its latch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    view: View,
    latches: u8,
    /// Five for interrupts in the order of the latches, two for system errors.
    masks: u8,
}

impl Slot {
    /// As after power-on: a card that is there is on the bus at once (SHPC 1.0, 3.5).
    pub(super) fn new(card: bool) -> Self {
        let (state, power) =
            if card { (State::Enabled, Led::On) } else { (State::Disabled, Led::Off) };
        let view = View { state, power, attention: Led::Off, card };
        Self { view, latches: 0, masks: low_byte(ALL_MASKS >> MASKS) }
    }

    pub(super) fn view(&self) -> View {
        self.view
    }

    /// The logical slot register.
    pub(super) fn register(&self) -> u32 {
        let View { state, power, attention, card } = self.view;
        let (mrl, presence) = if card { (0, CARD) } else { (MRL_OPEN, EMPTY) };
        state as u32
            | (power as u32) << POWER
            | (attention as u32) << ATTENTION
            | mrl
            | (presence << PRESENCE)
            | u32::from(self.latches) << LATCHES
            | u32::from(self.masks) << MASKS
    }

    /// The guest writes the bits of `mask` of the logical slot register.
    pub(super) fn write(&mut self, value: u32, mask: u32) {
        self.latches &= !low_byte((value & mask & ALL_LATCHES) >> LATCHES);
        let (value, mask) = ((value & ALL_MASKS) >> MASKS, (mask & ALL_MASKS) >> MASKS);
        self.masks = self.masks & !low_byte(mask) | low_byte(value & mask);
    }

    /// Whether it interrupts, as long as the controller lets it.
    pub(super) fn interrupts(&self) -> bool {
        self.latches & !self.masks & latch::ALL != 0
    }

    /// Whether a press of the button would be heard.
    pub(super) fn hears_button(&self) -> bool {
        self.masks & latch::BUTTON == 0
    }

    /// A slot operation (table 4-11): new state and lights, each 0 to leave it.
    ///
    /// A refused one changes nothing.
    pub(super) fn operate(&mut self, operation: u8) -> Result<(), Fault> {
        let operation = u32::from(operation);
        let state = State::of(operation & 3);
        match state {
            Some(State::PoweredOnly | State::Enabled) if !self.view.card => {
                return Err(Fault::MrlOpen);
            }
            // Only through being disabled does a card leave the bus.
            Some(State::PoweredOnly) if self.view.state == State::Enabled => {
                return Err(Fault::Invalid);
            }
            _ => {}
        }
        self.view.state = state.unwrap_or(self.view.state);
        self.view.power = Led::of(operation >> POWER & 3).unwrap_or(self.view.power);
        self.view.attention = Led::of(operation >> ATTENTION & 3).unwrap_or(self.view.attention);
        Ok(())
    }

    /// Somebody presses the attention button.
    pub(super) fn press_button(&mut self) {
        self.latches |= latch::BUTTON;
    }

    /// Whether the guest has not taken notice of the last press yet.
    pub(super) fn is_pressed(&self) -> bool {
        self.latches & latch::BUTTON != 0
    }

    /// A press that the guest has not taken notice of is as if it had not been.
    pub(super) fn withdraw_press(&mut self) {
        self.latches &= !latch::BUTTON;
    }

    /// A card is put in and its latch closed.
    pub(super) fn insert(&mut self) {
        self.view.card = true;
        self.latches |= latch::PRESENCE | latch::MRL;
    }

    /// There is a card as if it had been there since power-on.
    pub(super) fn insert_cold(&mut self) {
        self.view = Self::new(true).view;
    }

    /// The latch is opened and the card pulled, which takes its power.
    pub(super) fn pull(&mut self) {
        self.view.card = false;
        self.view.state = State::Disabled;
        self.latches |= latch::PRESENCE | latch::MRL;
    }

    /// The slot whose register was saved.
    pub(super) fn of_register(register: u32) -> Option<Self> {
        let card = register & MRL_OPEN == 0;
        let view = View {
            state: State::of(register & 3)?,
            power: Led::of(register >> POWER & 3)?,
            attention: Led::of(register >> ATTENTION & 3)?,
            card,
        };
        let slot = Self {
            view,
            latches: low_byte((register & ALL_LATCHES) >> LATCHES),
            masks: low_byte((register & ALL_MASKS) >> MASKS),
        };
        let possible = register & RESERVED == 0 && (card || view.state == State::Disabled);
        (possible && slot.register() == register).then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The operations that Linux uses (drivers/pci/hotplug/shpchp_hpc.c).
    const POWER_ON: u8 = 0x01;
    const ENABLE_BLINKING: u8 = 0x3a;
    const DISABLE: u8 = 0x1f;
    const POWER_LED_ON: u8 = 0x04;

    #[test]
    fn after_power_on_a_card_is_on_the_bus_and_an_empty_slot_is_dark() {
        let card = Slot::new(true);
        assert_eq!(card.register(), 0x7f00_0036, "enabled, power on, attention off, all masked");
        let empty = Slot::new(false);
        assert_eq!(empty.register(), 0x7f00_0d3f, "disabled, dark, latch open, nothing present");
    }

    #[test]
    fn a_card_is_powered_then_enabled_then_disabled() {
        let mut slot = Slot::new(false);
        slot.insert();
        slot.operate(POWER_ON).unwrap();
        assert_eq!((slot.view().state, slot.view().power), (State::PoweredOnly, Led::Off));
        slot.operate(ENABLE_BLINKING).unwrap();
        assert_eq!((slot.view().state, slot.view().power), (State::Enabled, Led::Blink));
        slot.operate(POWER_LED_ON).unwrap();
        assert_eq!((slot.view().state, slot.view().power), (State::Enabled, Led::On));
        slot.operate(DISABLE).unwrap();
        let dark = View { state: State::Disabled, power: Led::Off, attention: Led::On, card: true };
        assert_eq!(slot.view(), dark);
    }

    #[test]
    fn an_empty_slot_cannot_be_powered() {
        let mut slot = Slot::new(false);
        for operation in [POWER_ON, ENABLE_BLINKING] {
            let before = slot;
            assert_eq!(slot.operate(operation), Err(Fault::MrlOpen));
            assert_eq!(slot, before, "not even its lights change");
        }
        slot.operate(0x20).unwrap();
        assert_eq!(slot.view().attention, Led::Blink, "lights can be switched");
    }

    #[test]
    fn an_enabled_slot_cannot_be_merely_powered() {
        let mut slot = Slot::new(true);
        assert_eq!(slot.operate(POWER_ON), Err(Fault::Invalid));
        assert_eq!(slot.view().state, State::Enabled);
    }

    #[test]
    fn events_wait_until_they_are_cleared_by_writing_ones() {
        let mut slot = Slot::new(true);
        slot.press_button();
        assert!(!slot.interrupts(), "it is masked");
        slot.write(0, 0x0400_0000);
        assert!(slot.interrupts() && slot.hears_button());
        slot.write(1 << 16, !ALL_MASKS);
        assert!(slot.interrupts(), "another event was cleared");
        slot.write(1 << 18, 0x00ff_0000);
        assert!(!slot.interrupts());
    }

    #[test]
    fn a_pulled_card_loses_its_power_and_tells_of_presence_and_latch() {
        let mut slot = Slot::new(true);
        slot.pull();
        assert_eq!(slot.register() >> 16 & 0x1f, 0b01001);
        assert_eq!((slot.view().state, slot.view().card), (State::Disabled, false));
    }

    proptest! {
        #[test]
        fn whatever_the_guest_does_a_slot_without_a_card_has_no_power(
            steps in prop::collection::vec((0u8..4, any::<u8>(), any::<u32>(), any::<u32>()), 0..64),
        ) {
            let mut slot = Slot::new(false);
            for (what, operation, value, mask) in steps {
                match what {
                    0 => slot.insert(),
                    1 => slot.pull(),
                    2 => drop(slot.operate(operation & 0x3f)),
                    _ => slot.write(value, mask),
                }
                prop_assert!(slot.view().card || slot.view().state == State::Disabled);
                prop_assert_eq!(slot.register() & RESERVED, 0);
                prop_assert_eq!(Slot::of_register(slot.register()), Some(slot));
            }
        }

        #[test]
        fn no_other_register_is_a_slot(register: u32) {
            if let Some(slot) = Slot::of_register(register) {
                prop_assert_eq!(slot.register(), register);
            }
        }
    }
}
