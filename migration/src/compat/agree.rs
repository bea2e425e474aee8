//! Comparing an offer with what there is.

use std::collections::BTreeMap;

use super::{Item, Mismatch, Profile, Rule, Value};

/// Compares what the source `offered` with what the destination would `have`.
///
/// Gives every mismatch, not the first. An item that only one side knows is a mismatch where the
/// guest could see it: always if the source has it, under [`Rule::Eq`] if the destination has.
pub fn agree(offered: &Profile, have: &Profile) -> Result<(), Vec<Mismatch>> {
    let here: BTreeMap<_, _> = have.items().iter().map(|item| (&item.path, item)).collect();
    let mut mismatches: Vec<_> = offered
        .items()
        .iter()
        .filter_map(|item| compare(item, here.get(&item.path).map(|item| &item.value)))
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

fn compare(item: &Item, found: Option<&Value>) -> Option<Mismatch> {
    let (fits, remedy) = match (item.rule, &item.value, found) {
        (Rule::Host, _, _) => return None,
        (_, _, None) => (false, "use the same uvmm and the same devices on both sides".into()),
        (Rule::Eq, wanted, Some(found)) => {
            (wanted == found, "make both sides the same, or choose another host".into())
        }
        (Rule::AtLeast, Value::Number(wanted), Some(Value::Number(found))) => {
            (found >= wanted, "choose a host with more".into())
        }
        (Rule::Subset, Value::Bits(wanted), Some(Value::Bits(found))) => {
            let missing = missing(wanted, found);
            let none = missing.iter().all(|&word| word == 0);
            (none, format!("choose a host that has {}", Value::Bits(missing)))
        }
        (Rule::AtLeast | Rule::Subset, _, Some(_)) => {
            (false, "use the same uvmm on both sides".into())
        }
    };
    (!fits).then(|| Mismatch {
        path: item.path.clone(),
        wanted: item.value.to_string(),
        found: found.map_or_else(|| "nothing".into(), Value::to_string),
        remedy,
    })
}

/// The bits of `wanted` that `found` lacks.
fn missing(wanted: &[u64], found: &[u64]) -> Vec<u64> {
    let found = found.iter().copied().chain(std::iter::repeat(0));
    wanted.iter().zip(found).map(|(wanted, found)| wanted & !found).collect()
}

#[cfg(test)]
mod tests {
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
