//! What the user chose for the migration of a device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::DeviceError;

/// How an assigned device takes part in a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The best way that the device and the guest have.
    #[default]
    Auto,
    /// The guest's driver suspends it and resumes it on the other side.
    Pause,
    /// The guest is asked to let go of it, and given another.
    Evict,
    /// Its own state is carried over.
    Native,
    /// It does not.
    Refuse,
}

/// What to do when the guest cannot pause a device, or does not in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Ask the guest to let go of it, and give it another at the destination.
    #[default]
    Evict,
    /// Do not migrate: the guest goes on where it is.
    Refuse,
}

impl FromStr for Strategy {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let all = [Self::Auto, Self::Pause, Self::Evict, Self::Native, Self::Refuse];
        let found = all.into_iter().find(|strategy| strategy.as_str() == text);
        found.ok_or_else(|| DeviceError::Strategy(text.chars().take(64).collect()))
    }
}

impl Strategy {
    /// Its name on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Pause => "pause",
            Self::Evict => "evict",
            Self::Native => "native",
            Self::Refuse => "refuse",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for OnTimeout {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "evict" => Ok(Self::Evict),
            "refuse" => Ok(Self::Refuse),
            other => Err(DeviceError::OnTimeout(other.chars().take(64).collect())),
        }
    }
}

impl fmt::Display for OnTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Evict => "evict",
            Self::Refuse => "refuse",
        })
    }
}
