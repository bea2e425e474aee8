//! What a machine is made of, and whether two hosts agree on it.
//!
//! Everything that could refuse a guest is compared before anything is started, and all of it at
//! once: whoever must change something learns of it in one go.

mod agree;

use std::collections::BTreeSet;
use std::fmt::{self, Write};

pub use agree::{Terms, agree, agree_in_terms};
use serde::{Deserialize, Serialize};

/// The longest text of a mismatch, in characters.
const TOLD: usize = 500;

/// How the value of an item at the destination must relate to that at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// The same: whatever the guest can see.
    Eq,
    /// A number that is as large or larger: capacity that is not shown to the guest.
    AtLeast,
    /// Every member of the source is there: features that the guest may use.
    Subset,
    /// Not compared, only told: what belongs to the host.
    Host,
}

/// The value of an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// Something that is there or not.
    Flag(bool),
    /// A size, a count, a rate.
    Number(u64),
    /// A name.
    Text(String),
    /// A set of features; words that one side lacks are zero.
    Bits(Vec<u64>),
    /// A set of numbers.
    Numbers(BTreeSet<u64>),
}

/// One property of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// What it is a property of: `cpu/tsc-khz`, `pci/00:03.0/model`.
    pub path: String,
    /// How it is compared.
    pub rule: Rule,
    /// What it is.
    pub value: Value,
}

/// The properties of a machine, or of what a host can offer to one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    items: Vec<Item>,
}

impl Profile {
    /// A profile of no items.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an item; `path` should be new.
    #[must_use]
    pub fn with(self, path: impl Into<String>, rule: Rule, value: impl Into<Value>) -> Self {
        self.with_item(Item { path: path.into(), rule, value: value.into() })
    }

    /// The same, of an item that is there.
    #[must_use]
    pub fn with_item(mut self, item: Item) -> Self {
        self.items.push(item);
        self
    }

    /// The items, in the order they were added.
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.items
    }
}

/// What the source wants to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The name of the guest, for people.
    pub name: String,
    /// How to build the machine. Means nothing to the engine.
    pub config: Vec<u8>,
    /// What the machine is made of.
    pub profile: Profile,
    /// Guest memory: start and length in bytes of each range, by address. The engine fills it in.
    pub ram: Vec<(u64, u64)>,
}

/// Something that the destination cannot give to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The property.
    pub path: String,
    /// What the source has.
    pub wanted: String,
    /// What the destination has.
    pub found: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, wanted, found, remedy } = self;
        let told = format!("{path}: wanted {wanted}, found {found}: {remedy}");
        // A peer wrote this, and a terminal may show it.
        let plain = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
        told.chars().take(TOLD).try_for_each(|c| f.write_char(plain(c)))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{}", if *flag { "yes" } else { "no" }),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "\"{}\"", text.escape_debug()),
            Self::Bits(words) => {
                f.write_str("0x")?;
                words.iter().rev().try_for_each(|word| write!(f, "{word:016x}"))
            }
            Self::Numbers(numbers) => {
                let numbers: Vec<_> = numbers.iter().map(|number| format!("{number:#x}")).collect();
                write!(f, "{{{}}}", numbers.join(", "))
            }
        }
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<BTreeSet<u64>> for Value {
    fn from(numbers: BTreeSet<u64>) -> Self {
        Self::Numbers(numbers)
    }
}

impl From<Vec<u64>> for Value {
    fn from(words: Vec<u64>) -> Self {
        Self::Bits(words)
    }
}
