//! `cargo lab bench`: what the README claims, measured against others in one run.
pub mod boot;
pub mod handover;
pub mod migration;
pub mod passthrough;
mod pulse;
mod qmp;
mod raw;
mod vmms;

use std::fmt;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::{Context, Error, Result, reading};

/// Runs of each VMM; the median counts.
pub const RUNS: usize = 5;

/// One figure and what it should be.
#[derive(Debug, Serialize)]
pub struct Row {
    figure: String,
    #[serde(flatten)]
    goal: Option<Goal>,
    measured: f64,
    unit: &'static str,
    /// How what was measured ended, where that can differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<String>,
}

/// What is good enough.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

impl Row {
    /// Whether the goal is reached, or there is none.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.goal.is_none_or(|goal| match goal {
            Goal::AtMost(most) => self.measured <= most,
            Goal::AtLeast(least) => self.measured >= least,
        })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<64} {:>8.2} {:<4}", self.figure, self.measured, self.unit)?;
        let goal = match self.goal {
            None => None,
            Some(Goal::AtMost(most)) => Some(format!("<= {most:.2}")),
            Some(Goal::AtLeast(least)) => Some(format!(">= {least:.2}")),
        };
        if let Some(goal) = goal {
            write!(f, " goal {goal:>9}  {}", if self.ok() { "ok" } else { "MISSED" })?;
        }
        self.ended.as_ref().map_or(Ok(()), |ended| write!(f, "  {ended}"))
    }
}

/// A figure that only explains others.
fn figure(name: impl Into<String>, measured: f64, unit: &'static str) -> Row {
    Row { figure: name.into(), goal: None, measured, unit, ended: None }
}

fn at_most(most: f64, name: impl Into<String>, measured: f64, unit: &'static str) -> Row {
    Row { goal: Some(Goal::AtMost(most)), ..figure(name, measured, unit) }
}

fn at_least(least: f64, name: impl Into<String>, measured: f64, unit: &'static str) -> Row {
    Row { goal: Some(Goal::AtLeast(least)), ..figure(name, measured, unit) }
}

/// How `all` ended, in a few words: each end once, the first one first, with how many had it.
fn ends(all: impl IntoIterator<Item = impl fmt::Display>) -> String {
    let all: Vec<_> = all.into_iter().map(|end| end.to_string()).collect();
    let mut different: Vec<&String> = Vec::new();
    for end in &all {
        if !different.contains(&end) {
            different.push(end);
        }
    }
    if let [only] = different[..] {
        return only.clone();
    }
    let counted = |end: &&String| {
        format!("{end} in {} of {}", all.iter().filter(|other| other == end).count(), all.len())
    };
    different.iter().map(counted).collect::<Vec<_>>().join(", ")
}

/// The resident memory that is no shared memory; guest RAM of uvmm is a memfd, and so shared.
fn resident_mib(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let status = fs::read_to_string(&path).context(|| reading(&path))?;
    let kib = |key: &str| -> Option<f64> {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key))?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    };
    match (kib("RssAnon:"), kib("RssFile:")) {
        (Some(anonymous), Some(file)) => Ok((anonymous + file) / 1024.0),
        _ => Err(Error::Unsupported(format!("{} tells no resident size", path.display()))),
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert!(median([]).is_nan());
    }

    #[test]
    fn a_row_tells_how_it_ended() {
        let row = |ended| Row { ended: Some(ended), ..at_most(2.0, "time", 1.0, "s") };
        assert!(row(ends(["forced"; 3])).to_string().ends_with("ok  forced"));
        let mixed = ends(["forced", "not within 60 s", "forced"]);
        assert!(row(mixed).to_string().ends_with("forced in 2 of 3, not within 60 s in 1 of 3"));
        assert!(figure("time", 1.0, "s").to_string().trim_end().ends_with('s'));
    }

    #[test]
    fn a_goal_is_the_most_or_the_least_that_is_good_enough() {
        assert!(at_most(6.0, "", 6.0, "MiB").ok());
        assert!(!at_most(6.0, "", 6.01, "MiB").ok());
        assert!(at_least(0.85, "", 0.85, "").ok());
        assert!(!at_least(0.85, "", 0.84, "").ok());
        assert!(!at_most(6.0, "", f64::NAN, "").ok() && !at_least(0.0, "", f64::NAN, "").ok());
    }
}
