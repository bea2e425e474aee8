//! Comparing an offer with what there is.

use std::collections::BTreeMap;

use super::{Item, Mismatch, Profile, Rule, Value};
use crate::state::format;

/// How people call what a profile tells, and what they can do where hosts differ.
///
/// The engine knows neither, but of the formats of states; where `None` is given, it finds general
/// words.
pub trait Terms {
    /// The name of a member of the set at `path`: a bit of [`Value::Bits`], counted from 0, or a
    /// number of [`Value::Numbers`].
    fn member(&self, path: &str, member: u64) -> Option<String>;

    /// What to do about a mismatch at `path`.
    fn remedy(&self, path: &str) -> Option<String>;
}

/// No terms but the general ones.
struct Plain;

impl Terms for Plain {
    fn member(&self, _path: &str, _member: u64) -> Option<String> {
        None
    }

    fn remedy(&self, _path: &str) -> Option<String> {
        None
    }
}

/// Compares what the source `offered` with what the destination would `have`.
///
/// Gives every mismatch, not the first. An item that only one side knows is a mismatch where the
/// guest could see it: always if the source has it, under [`Rule::Eq`] if the destination has.
pub fn agree(offered: &Profile, have: &Profile) -> Result<(), Vec<Mismatch>> {
    agree_in_terms(offered, have, &Plain)
}

/// The same as [`agree`], in somebody's terms.
///
/// # Errors
/// Every mismatch.
pub fn agree_in_terms(
    offered: &Profile,
    have: &Profile,
    terms: &dyn Terms,
) -> Result<(), Vec<Mismatch>> {
    let here: BTreeMap<_, _> = have.items().iter().map(|item| (&item.path, item)).collect();
    let mut mismatches: Vec<_> = offered
        .items()
        .iter()
        .filter_map(|item| compare(item, here.get(&item.path).map(|item| &item.value), terms))
        .collect();
    let there: BTreeMap<_, _> = offered.items().iter().map(|item| (&item.path, item)).collect();
    let surplus =
        have.items().iter().filter(|item| item.rule == Rule::Eq && !there.contains_key(&item.path));
    mismatches.extend(surplus.map(|item| Mismatch {
        path: item.path.clone(),
        wanted: "nothing".into(),
        found: item.value.to_string(),
        remedy: "switch it off at the destination".into(),
    }));
    if mismatches.is_empty() { Ok(()) } else { Err(mismatches) }
}

fn compare(item: &Item, found: Option<&Value>, terms: &dyn Terms) -> Option<Mismatch> {
    let (fits, remedy) = match (item.rule, &item.value, found) {
        (Rule::Host, _, _) => return None,
        (_, _, None) => {
            let general = || "use the same uvmm and the same devices on both sides".into();
            (false, format::remedy(&item.path).unwrap_or_else(general))
        }
        (Rule::Eq, wanted, Some(found)) => {
            (wanted == found, "make both sides the same, or choose another host".into())
        }
        (Rule::AtLeast, Value::Number(wanted), Some(Value::Number(found))) => {
            (found >= wanted, "choose a host with more".into())
        }
        (Rule::Subset, wanted, Some(found)) => match missing(wanted, found) {
            Some(missing) => return lacks(item, found, &missing, terms),
            None => (false, "use the same uvmm on both sides".into()),
        },
        (Rule::AtLeast, _, Some(_)) => (false, "use the same uvmm on both sides".into()),
    };
    (!fits).then(|| Mismatch {
        path: item.path.clone(),
        wanted: item.value.to_string(),
        found: found.map_or_else(|| "nothing".into(), Value::to_string),
        remedy: terms.remedy(&item.path).filter(|_| found.is_some()).unwrap_or(remedy),
    })
}

/// Tells which members of a set are `missing`, by their names if they have any.
fn lacks(item: &Item, found: &Value, missing: &Value, terms: &dyn Terms) -> Option<Mismatch> {
    let members = members(missing);
    if members.is_empty() {
        return None;
    }
    let path = &item.path;
    let name = |&member: &u64| terms.member(path, member).or_else(|| format::name(path, member));
    let (wanted, found) = match members.iter().map(name).collect::<Option<Vec<_>>>() {
        Some(names) => {
            let found = if names.len() == 1 { "a host without it" } else { "a host without them" };
            (names.join(", "), found.to_owned())
        }
        None => (item.value.to_string(), found.to_string()),
    };
    let remedy = || format!("choose a host that has {missing}");
    let remedy = terms.remedy(path).or_else(|| format::remedy(path)).unwrap_or_else(remedy);
    Some(Mismatch { path: path.clone(), wanted, found, remedy })
}

/// The members of the set `wanted` that `found` lacks; `None` if those are not two alike sets.
fn missing(wanted: &Value, found: &Value) -> Option<Value> {
    match (wanted, found) {
        (Value::Bits(wanted), Value::Bits(found)) => {
            let found = found.iter().copied().chain(std::iter::repeat(0));
            let missing = wanted.iter().zip(found).map(|(wanted, found)| wanted & !found);
            Some(Value::Bits(missing.collect()))
        }
        (Value::Numbers(wanted), Value::Numbers(found)) => Some(Value::Numbers(wanted - found)),
        _ => None,
    }
}

/// The first members of a set, more than anybody reads: a peer may have sent many.
fn members(set: &Value) -> Vec<u64> {
    const TOLD: usize = 64;
    let members: Box<dyn Iterator<Item = u64>> = match set {
        Value::Bits(words) => Box::new((0..).zip(words).flat_map(|(at, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at * 64 + bit)
        })),
        Value::Numbers(numbers) => Box::new(numbers.iter().copied()),
        Value::Flag(_) | Value::Number(_) | Value::Text(_) => Box::new(std::iter::empty()),
    };
    members.take(TOLD).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn source() -> Profile {
        Profile::new()
            .with("arch", Rule::Eq, "x86_64")
            .with("cpu/features", Rule::Subset, vec![0b1011, 1])
            .with("cpu/physical-bits", Rule::AtLeast, 40)
            .with("host/kernel", Rule::Host, "6.12")
    }

    fn mismatches(have: &Profile) -> Vec<String> {
        agree(&source(), have).err().unwrap_or_default().into_iter().map(|m| m.path).collect()
    }

    #[test]
    fn a_host_with_more_of_what_may_be_more_agrees() {
        let have = Profile::new()
            .with("arch", Rule::Eq, "x86_64")
            .with("cpu/features", Rule::Subset, vec![0b1111, 3, 7])
            .with("cpu/physical-bits", Rule::AtLeast, 46)
            .with("host/kernel", Rule::Host, "7.0");
        agree(&source(), &have).unwrap();
    }

    #[test]
    fn all_mismatches_come_at_once() {
        let have = Profile::new()
            .with("arch", Rule::Eq, "aarch64")
            .with("cpu/features", Rule::Subset, vec![0b1001])
            .with("cpu/physical-bits", Rule::AtLeast, 39)
            .with("cpu/nested", Rule::Eq, true);
        let expected = ["arch", "cpu/features", "cpu/physical-bits", "cpu/nested"];
        assert_eq!(mismatches(&have), expected);
    }

    #[test]
    fn what_the_destination_does_not_know_is_a_mismatch() {
        assert_eq!(mismatches(&Profile::new()), ["arch", "cpu/features", "cpu/physical-bits"]);
    }

    #[test]
    fn values_of_different_types_never_agree() {
        let have = Profile::new()
            .with("arch", Rule::Eq, 1)
            .with("cpu/features", Rule::Subset, 15)
            .with("cpu/physical-bits", Rule::AtLeast, "46");
        assert_eq!(mismatches(&have).len(), 3);
    }

    #[test]
    fn a_mismatch_tells_what_was_wanted_found_and_what_to_do() {
        let have = Profile::new().with("cpu/features", Rule::Subset, vec![0b1001, 1]);
        let wanted = Profile::new().with("cpu/features", Rule::Subset, vec![0b1011]);
        let told = agree(&wanted, &have).unwrap_err()[0].to_string();
        assert_eq!(
            told,
            "cpu/features: wanted 0x000000000000000b, found 0x00000000000000010000000000000009: \
             choose a host that has 0x0000000000000002"
        );
    }

    struct Named;

    impl Terms for Named {
        fn member(&self, path: &str, member: u64) -> Option<String> {
            (path != "unnamed").then(|| format!("m{member}"))
        }

        fn remedy(&self, path: &str) -> Option<String> {
            (path == "cpu/msrs").then(|| "mend it".into())
        }
    }

    #[test]
    fn what_a_set_lacks_is_told_by_name() {
        let wanted = Profile::new()
            .with("cpu/features", Rule::Subset, vec![0b1011, 1])
            .with("cpu/msrs", Rule::Subset, BTreeSet::from([7, 9]))
            .with("unnamed", Rule::Subset, BTreeSet::from([16]));
        let have = Profile::new()
            .with("cpu/features", Rule::Subset, vec![0b1001])
            .with("cpu/msrs", Rule::Subset, BTreeSet::from([8, 9]))
            .with("unnamed", Rule::Subset, BTreeSet::from([]));
        let told = agree_in_terms(&wanted, &have, &Named).unwrap_err();
        let told: Vec<_> = told.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "cpu/features: wanted m1, m64, found a host without them: choose a host that has \
                 0x00000000000000010000000000000002",
                "cpu/msrs: wanted m7, found a host without it: mend it",
                "unnamed: wanted {0x10}, found {}: choose a host that has {0x10}",
            ]
        );
        agree_in_terms(&wanted, &wanted, &Named).unwrap();
    }

    #[test]
    fn however_much_a_peer_wants_it_is_told_in_a_line() {
        let wanted = Profile::new().with("a", Rule::Subset, vec![u64::MAX; 1 << 16]);
        let have = Profile::new().with("a", Rule::Subset, vec![]);
        let told = &agree_in_terms(&wanted, &have, &Named).unwrap_err()[0];
        assert!(told.wanted.len() < 1000, "{}", told.wanted.len());
    }

    proptest! {
        #[test]
        fn every_machine_agrees_with_itself(words: Vec<u64>, number: u64, text: String) {
            let profile = Profile::new()
                .with("a", Rule::Subset, words)
                .with("b", Rule::AtLeast, number)
                .with("c", Rule::Eq, text);
            prop_assert!(agree(&profile, &profile).is_ok());
        }
    }
}
