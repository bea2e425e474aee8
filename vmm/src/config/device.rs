//! The devices of the host that a guest is given.

mod strategy;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use strategy::{OnTimeout, Strategy};

/// The slots that a bridge can have, as they are numbered for people.
pub const SLOTS: RangeInclusive<u8> = 1..=31;
/// The most characters an id may have.
const LONGEST_ID: usize = 32;
const FORM: &str = "write vfio,id=ID,host=BDF[,slot=N][,strategy=S][,on-timeout=A]";

/// A device of the host that a guest is given: `vfio,id=net0,host=0000:01:10.0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub struct DeviceConfig {
    /// What it is called here, and on the other side of a migration.
    pub id: DeviceId,
    /// Which device it is.
    pub host: HostDevice,
    /// The slot that it goes into, within [`SLOTS`]; `None` for the first that is free.
    pub slot: Option<u8>,
    /// How it migrates.
    pub strategy: Strategy,
    /// What to do when the guest does not pause it.
    pub on_timeout: OnTimeout,
}

/// The name of a guest's device: letters, digits, `.`, `_` and `-`, at most 32.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceId(String);

/// Which device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostDevice {
    /// A PCI function by its address, as sysfs writes it: `0000:01:10.0`.
    Pci(String),
    /// A directory of sysfs: that of a PCI function or of a mediated device.
    Path(PathBuf),
}

/// Why a text is no device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It is not a list of settings.
    #[error("{0:?} is not a setting of a device: {FORM}")]
    Setting(String),
    /// A setting that is there twice.
    #[error("{0}= is there twice")]
    Twice(String),
    /// A setting that has to be there is not.
    #[error("a device needs {0}: {FORM}")]
    Missing(&'static str),
    /// Another kind of device.
    #[error("{0:?} is not a kind of device: choose vfio")]
    Kind(String),
    /// An id with other characters, or none, or too many.
    #[error("{0:?} is not a device's id: use 1 to 32 letters, digits, '.', '_' or '-'")]
    Id(String),
    /// Neither an address nor a path.
    #[error(
        "{0:?} is no device of the host: write a PCI address such as 0000:01:10.0, or a path below /sys"
    )]
    Host(String),
    /// Not a slot.
    #[error("{0:?} is not a slot: choose {min} to {max}", min = SLOTS.start(), max = SLOTS.end())]
    Slot(String),
    /// Not a strategy.
    #[error("{0:?} is not a strategy: choose auto, pause, evict, native or refuse")]
    Strategy(String),
    /// Not something to do.
    #[error("{0:?} is nothing to do when a guest does not pause a device: choose evict or refuse")]
    OnTimeout(String),
}

/// Why devices do not go together.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TogetherError {
    /// Two have the same id.
    #[error("two devices have the id {0}: give each its own")]
    Id(DeviceId),
    /// Two are to go into the same slot.
    #[error("two devices are to go into slot {0}: give each its own")]
    Slot(u8),
    /// The same device is given twice.
    #[error("{0} is given twice: a device can be in one place only")]
    Host(HostDevice),
}

/// Checks whether all of `devices` can be in one machine.
///
/// # Errors
/// The first that stands in the way of another.
pub(super) fn check_together(devices: &[DeviceConfig]) -> Result<(), TogetherError> {
    let (mut ids, mut slots, mut hosts) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for device in devices {
        if !ids.insert(&device.id) {
            return Err(TogetherError::Id(device.id.clone()));
        }
        if let Some(slot) = device.slot
            && !slots.insert(slot)
        {
            return Err(TogetherError::Slot(slot));
        }
        if !hosts.insert(device.host.sysfs()) {
            return Err(TogetherError::Host(device.host.clone()));
        }
    }
    Ok(())
}

/// A device as it is written in a file, and as its settings are collected.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Table {
    r#type: Option<String>,
    id: Option<DeviceId>,
    host: Option<HostDevice>,
    slot: Option<u8>,
    strategy: Option<Strategy>,
    #[serde(rename = "on-timeout")]
    on_timeout: Option<OnTimeout>,
}

impl TryFrom<Table> for DeviceConfig {
    type Error = DeviceError;

    fn try_from(table: Table) -> Result<Self, DeviceError> {
        let Table { r#type, id, host, slot, strategy, on_timeout } = table;
        match r#type.as_deref() {
            Some("vfio") => {}
            Some(other) => return Err(DeviceError::Kind(other.to_owned())),
            None => return Err(DeviceError::Missing("its kind first")),
        }
        if let Some(slot) = slot.filter(|slot| !SLOTS.contains(slot)) {
            return Err(DeviceError::Slot(slot.to_string()));
        }
        Ok(DeviceConfig {
            id: id.ok_or(DeviceError::Missing("id="))?,
            host: host.ok_or(DeviceError::Missing("host="))?,
            slot,
            strategy: strategy.unwrap_or_default(),
            on_timeout: on_timeout.unwrap_or_default(),
        })
    }
}

impl From<DeviceConfig> for Table {
    fn from(device: DeviceConfig) -> Self {
        let DeviceConfig { id, host, slot, strategy, on_timeout } = device;
        Table {
            r#type: Some("vfio".to_owned()),
            id: Some(id),
            host: Some(host),
            slot,
            strategy: Some(strategy),
            on_timeout: Some(on_timeout),
        }
    }
}

impl FromStr for DeviceConfig {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let mut settings = text.split(',');
        let kind = settings.next().filter(|kind| !kind.is_empty()).map(str::to_owned);
        let mut table = Table { r#type: kind, ..Table::default() };
        for setting in settings {
            let (name, value) =
                setting.split_once('=').ok_or_else(|| DeviceError::Setting(setting.to_owned()))?;
            let new = match name {
                "id" => table.id.replace(value.parse()?).is_none(),
                "host" => table.host.replace(value.parse()?).is_none(),
                "slot" => {
                    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
                    let slot = value.parse().ok().filter(|_| digits);
                    let slot = slot.ok_or_else(|| DeviceError::Slot(value.to_owned()))?;
                    table.slot.replace(slot).is_none()
                }
                "strategy" => table.strategy.replace(value.parse()?).is_none(),
                "on-timeout" => table.on_timeout.replace(value.parse()?).is_none(),
                _ => return Err(DeviceError::Setting(setting.to_owned())),
            };
            if !new {
                return Err(DeviceError::Twice(name.to_owned()));
            }
        }
        table.try_into()
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vfio,id={},host={}", self.id, self.host)?;
        if let Some(slot) = self.slot {
            write!(f, ",slot={slot}")?;
        }
        if self.strategy != Strategy::default() {
            write!(f, ",strategy={}", self.strategy)?;
        }
        if self.on_timeout != OnTimeout::default() {
            write!(f, ",on-timeout={}", self.on_timeout)?;
        }
        Ok(())
    }
}

impl DeviceId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceId {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if (1..=LONGEST_ID).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(DeviceError::Id(text.chars().take(2 * LONGEST_ID).collect()))
        }
    }
}

impl HostDevice {
    /// Where sysfs has it.
    #[must_use]
    pub fn sysfs(&self) -> PathBuf {
        match self {
            Self::Pci(address) => Path::new("/sys/bus/pci/devices").join(address),
            Self::Path(path) => path.clone(),
        }
    }
}

impl FromStr for HostDevice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        if let Some(address) = pci_address(text) {
            return Ok(Self::Pci(address));
        }
        let plain = !text.contains(['\0', ',']) && !text.split('/').any(|part| part == "..");
        if text.starts_with("/sys/") && plain {
            Ok(Self::Path(text.into()))
        } else {
            Err(DeviceError::Host(text.chars().take(256).collect()))
        }
    }
}

/// The canonical form of `[DDDD:]BB:DD.F`.
fn pci_address(text: &str) -> Option<String> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let number = |text: &str, digits: RangeInclusive<usize>, max: u32| {
        let plain = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        u32::from_str_radix(text, 16).ok().filter(|number| plain && *number <= max)
    };
    // Domains of more than 16 bits exist: Linux makes such up for some of its own.
    let domain = number(domain, 4..=8, u32::MAX)?;
    let bus = number(bus, 2..=2, 0xff)?;
    let device = number(device, 2..=2, 0x1f)?;
    let function = number(function, 1..=1, 7)?;
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

impl fmt::Display for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => f.pad(address),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

macro_rules! text {
    ($name:ty) => {
        impl TryFrom<String> for $name {
            type Error = DeviceError;

            fn try_from(text: String) -> Result<Self, DeviceError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    };
}
text!(DeviceId);
text!(HostDevice);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    // Named, because proptest has one as well.
    use super::Strategy;
    use super::*;

    fn device(text: &str) -> DeviceConfig {
        text.parse().unwrap()
    }

    #[test]
    fn every_documented_form_is_understood() {
        let short = device("vfio,id=net0,host=01:10.0");
        assert_eq!(short.host, HostDevice::Pci("0000:01:10.0".into()));
        assert_eq!((short.slot, short.strategy), (None, Strategy::Auto));
        assert_eq!(short.host.sysfs(), Path::new("/sys/bus/pci/devices/0000:01:10.0"));
        let full = device("vfio,strategy=pause,slot=3,host=10000:AB:1f.7,id=a.b-c_d");
        assert_eq!(full.host, HostDevice::Pci("10000:ab:1f.7".into()));
        assert_eq!((full.slot, full.strategy), (Some(3), Strategy::Pause));
        let mdev = "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        assert_eq!(device(&format!("vfio,id=m,host={mdev}")).host.sysfs(), Path::new(mdev));
    }

    #[test]
    fn a_table_says_the_same_as_a_text() {
        let table = "type = 'vfio'\nid = 'n'\nhost = '01:10.0'\nslot = 2\nstrategy = 'evict'";
        let read: DeviceConfig = toml::from_str(table).unwrap();
        assert_eq!(read, device("vfio,id=n,host=0000:01:10.0,slot=2,strategy=evict"));
        for wrong in ["type = 'tap'", "slot = 1", "colour = 1", "type = 'vfio'\nid = '/'"] {
            assert!(toml::from_str::<DeviceConfig>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_device_is_refused_in_a_line_that_says_what_would_be_one() {
        for (text, says) in [
            ("", "write vfio,id="),
            ("vfio", "needs id="),
            ("vfio,id=a", "needs host="),
            ("vfio,id=,host=01:10.0", "not a device's id"),
            ("vfio,id=a,host=01:10.8", "0000:01:10.0"),
            ("vfio,id=a,host=01:20.0", "0000:01:10.0"),
            ("vfio,id=a,host=+1:10.0", "0000:01:10.0"),
            ("vfio,id=a,host=/etc/passwd", "below /sys"),
            ("vfio,id=a,host=/sys/../etc", "below /sys"),
            ("vfio,id=a,host=01:10.0,slot=0", "choose 1 to 31"),
            ("vfio,id=a,host=01:10.0,slot=32", "choose 1 to 31"),
            ("vfio,id=a,host=01:10.0,slot=+1", "choose 1 to 31"),
            ("vfio,id=a,host=01:10.0,strategy=fly", "auto, pause"),
            ("vfio,id=a,host=01:10.0,on-timeout=wait", "choose evict or refuse"),
            ("vfio,id=a,id=b,host=01:10.0", "twice"),
            ("vfio,id=a,host=01:10.0,", "write vfio,id="),
            ("tap,id=a,host=01:10.0", "choose vfio"),
        ] {
            let error = text.parse::<DeviceConfig>().unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn devices_stand_in_each_others_way_by_id_slot_and_host() {
        let check =
            |texts: &[&str]| check_together(&texts.iter().map(|t| device(t)).collect::<Vec<_>>());
        let first = "vfio,id=a,host=01:10.0,slot=1";
        assert_eq!(check(&[first, "vfio,id=b,host=01:10.1", "vfio,id=c,host=01:10.2"]), Ok(()));
        for (other, text) in [
            ("vfio,id=a,host=01:10.1", "id a"),
            ("vfio,id=b,host=01:10.1,slot=1", "slot 1"),
            ("vfio,id=b,host=0000:01:10.0", "0000:01:10.0 is given twice"),
        ] {
            let error = check(&[first, other]).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_survives_being_written_and_read(
            text in r"vfio,id=[a-c.]{1,3},host=([0-9a-f]{4,5}:)?[0-9a-fA-F]{2}:[01][0-9a-f]\.[0-9](,slot=[0-9]{1,2})?(,strategy=(auto|pause|evict|native|refuse))?(,on-timeout=(evict|refuse))?"
        ) {
            if let Ok(device) = text.parse::<DeviceConfig>() {
                prop_assert_eq!(device.to_string().parse(), Ok(device.clone()));
                let table = toml::to_string(&device).unwrap();
                prop_assert_eq!(toml::from_str(&table), Ok(device));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String, setting in "vfio(,[a-z]{0,8}=.{0,8}){0,5}") {
            let _ = text.parse::<DeviceConfig>();
            let _ = setting.parse::<DeviceConfig>();
        }
    }
}
