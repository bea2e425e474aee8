//! What is told of the slots for devices that come and go.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::DeviceId;

/// One slot, as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotInfo {
    /// Its number, which the guest knows it by as well.
    pub number: u8,
    /// The PCI address of what is in it, as the guest finds it at boot.
    pub address: String,
    /// The device in it, if there is one.
    pub device: Option<DeviceId>,
    /// Its power.
    pub state: Power,
    /// The green light.
    pub power_led: Light,
    /// The amber light.
    pub attention_led: Light,
    /// Whether a driver of the guest listens to it, as it must for `plug` and `unplug`.
    pub driver: bool,
}

/// Whether a slot has power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// It has, but is not on the bus.
    Powered,
    /// It has, and is on the bus.
    Enabled,
    /// It has not.
    Disabled,
}

/// What a light shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Light {
    /// It shines.
    On,
    /// It blinks.
    Blink,
    /// It is dark.
    Off,
}

/// How far a device is on its way into a slot or out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotProgress {
    /// The slot.
    pub slot: u8,
    /// What happened last.
    pub stage: SlotStage,
}

/// A step on that way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotStage {
    /// The slot's button was pressed.
    Asked,
    /// The guest lets the power light blink.
    Accepted,
    /// The guest gave the slot power.
    Powered,
    /// The guest put it on the bus.
    Enabled,
    /// The guest took its power.
    Released,
    /// The guest will not.
    Refused,
}

impl fmt::Display for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Powered => "powered",
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
        })
    }
}

impl fmt::Display for Light {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::On => "on",
            Self::Blink => "blinks",
            Self::Off => "off",
        })
    }
}

impl fmt::Display for SlotInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, device, state, power_led, attention_led, driver, .. } = self;
        let device = device.as_ref().map_or("empty", DeviceId::as_str);
        let driver = if *driver { "driver listens" } else { "no driver listens" };
        write!(
            f,
            "{address} {device}: {state}, power light {power_led}, attention light \
             {attention_led}, {driver}"
        )
    }
}

impl fmt::Display for SlotProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}: ", self.slot)?;
        f.write_str(match self.stage {
            SlotStage::Asked => "asked",
            SlotStage::Accepted => "accepted, its power light blinks",
            SlotStage::Powered => "powered",
            SlotStage::Enabled => "enabled",
            SlotStage::Released => "released",
            SlotStage::Refused => "refused",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_told_in_one_line_and_in_plain_words_of_json() {
        let slot = SlotInfo {
            number: 2,
            address: "0000:01:02.0".into(),
            device: Some("net0".parse().unwrap()),
            state: Power::Enabled,
            power_led: Light::Blink,
            attention_led: Light::Off,
            driver: true,
        };
        assert_eq!(
            slot.to_string(),
            "0000:01:02.0 net0: enabled, power light blinks, attention light off, driver listens"
        );
        let json = serde_json::json!({
            "number": 2, "address": "0000:01:02.0", "device": "net0", "state": "enabled",
            "power_led": "blink", "attention_led": "off", "driver": true,
        });
        assert_eq!(serde_json::to_value(&slot).unwrap(), json);
    }
}
