//! The processors that a guest sees.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::feature;

/// The processors that a guest sees, the same at every host that it moves to.
///
/// In TOML: `base`, and lists `add` and `remove` of features.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuModel {
    /// What it begins with.
    pub base: CpuBase,
    /// Features beyond that.
    #[serde(default)]
    pub add: Vec<CpuFeature>,
    /// Features that it has not; wins over `add`.
    #[serde(default)]
    pub remove: Vec<CpuFeature>,
}

/// A set of features that is known by a name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuBase {
    /// All that this host's KVM can show.
    #[default]
    Host,
    /// A level of the x86-64 psABI (System V ABI, AMD64 supplement, table 3.1), and what KVM
    /// itself provides.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The level with AVX2.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// The level with AVX-512.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuBase {
    /// The levels, lowest first.
    pub const LEVELS: [Self; 3] = [Self::V2, Self::V3, Self::V4];
}

impl fmt::Display for CpuBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        })
    }
}

impl From<CpuBase> for CpuModel {
    fn from(base: CpuBase) -> Self {
        Self { base, add: Vec::new(), remove: Vec::new() }
    }
}

/// For people: `x86-64-v3+aes-avx2`.
impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base, add, remove } = self;
        write!(f, "{base}")?;
        add.iter().try_for_each(|feature| write!(f, "+{}", feature.name()))?;
        remove.iter().try_for_each(|feature| write!(f, "-{}", feature.name()))
    }
}

/// A feature of processors, by a name that uvmm knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct CpuFeature(&'static str);

impl CpuFeature {
    /// Its name in Linux's `/proc/cpuinfo`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.0
    }
}

/// Why a text names no processor.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CpuError {
    /// Not a feature.
    #[error("{0:?} is no feature that uvmm knows: write names as /proc/cpuinfo does")]
    Feature(String),
    /// Neither a level nor a file.
    #[error(
        "{0:?} is no kind of processor: write host, x86-64-v2, x86-64-v3, x86-64-v4 or the name \
         of a file that ends in .toml"
    )]
    Source(String),
}

impl TryFrom<String> for CpuFeature {
    type Error = CpuError;

    fn try_from(text: String) -> Result<Self, CpuError> {
        feature::known(&text).map(Self).ok_or(CpuError::Feature(text))
    }
}

/// By hand: serde's own would only take texts that live as long as the program.
impl<'de> Deserialize<'de> for CpuFeature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl From<CpuFeature> for String {
    fn from(feature: CpuFeature) -> String {
        feature.0.to_owned()
    }
}

/// Where it is written what processors a guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum CpuSource {
    /// In the name.
    Named(CpuBase),
    /// In a TOML file.
    File(PathBuf),
}

impl FromStr for CpuSource {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        let bases = [CpuBase::Host].into_iter().chain(CpuBase::LEVELS);
        match bases.into_iter().find(|base| base.to_string() == text) {
            Some(base) => Ok(Self::Named(base)),
            None if text.ends_with(".toml") => Ok(Self::File(text.into())),
            None => Err(CpuError::Source(text.to_owned())),
        }
    }
}

impl TryFrom<String> for CpuSource {
    type Error = CpuError;

    fn try_from(text: String) -> Result<Self, CpuError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_name_or_a_file_tells_the_processors() {
        for base in [CpuBase::Host, CpuBase::V2, CpuBase::V3, CpuBase::V4] {
            assert_eq!(base.to_string().parse(), Ok(CpuSource::Named(base)));
            let text = format!("base = '{base}'");
            assert_eq!(toml::from_str::<CpuModel>(&text).unwrap(), base.into());
        }
        assert_eq!("d/pool.toml".parse(), Ok(CpuSource::File("d/pool.toml".into())));
        for text in ["", "v3", "x86-64-v5", "Host", "pool"] {
            assert_eq!(text.parse::<CpuSource>(), Err(CpuError::Source(text.into())));
        }
    }

    #[test]
    fn a_file_adds_and_removes_features_by_name() {
        let text = "base = 'x86-64-v3'\nadd = ['aes', 'sse3']\nremove = ['lzcnt']";
        let model: CpuModel = toml::from_str(text).unwrap();
        assert_eq!(model.to_string(), "x86-64-v3+aes+pni-abm");
        let wire = serde_json::to_vec(&model).unwrap();
        assert_eq!(serde_json::from_slice::<CpuModel>(&wire).unwrap(), model);
    }

    #[test]
    fn what_no_processor_has_is_refused_with_the_word() {
        for (text, says) in [
            ("base = 'x86-64-v3'\nadd = ['avx3']", "\"avx3\" is no feature"),
            ("base = 'x86-64-v9'", "x86-64-v9"),
            ("add = ['aes']", "base"),
            ("base = 'host'\nremoved = []", "removed"),
        ] {
            let error = toml::from_str::<CpuModel>(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
