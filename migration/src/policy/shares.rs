//! Who is slowed down, and how much: those that write most.

/// The most that a vCPU is kept from running, in percent of the time: more than that is a stop.
const MOST: u8 = 99;

/// For how much of the time vCPUs are kept from running, in percent, at most 99.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shares {
    /// All of them: it is not known who writes.
    Alike(u8),
    /// Each, by its number.
    Each(Vec<u8>),
}

impl Shares {
    /// All run freely.
    pub const NONE: Self = Self::Alike(0);

    /// Of the vCPU of this number.
    #[must_use]
    pub fn of(&self, vcpu: usize) -> u8 {
        match self {
            Self::Alike(percent) => *percent,
            Self::Each(percents) => percents.get(vcpu).copied().unwrap_or(0),
        }
    }

    /// Of the one that is kept from running most.
    #[must_use]
    pub fn most(&self) -> u8 {
        match self {
            Self::Alike(percent) => *percent,
            Self::Each(percents) => percents.iter().copied().max().unwrap_or(0),
        }
    }

    /// Of each, where they are told apart.
    #[must_use]
    pub fn each(&self) -> &[u8] {
        match self {
            Self::Alike(_) => &[],
            Self::Each(percents) => percents,
        }
    }

    /// By how many percent less vCPUs wrote than if they had run freely, when they had these shares
    /// and each wrote so many pages.
    pub(super) fn effect(&self, by_vcpu: &[u64]) -> f64 {
        match (self, self.freely(by_vcpu)) {
            (Self::Alike(percent), _) => f64::from(*percent),
            (Self::Each(_), None) => 0.0,
            (Self::Each(_), Some(freely)) => {
                let wrote: f64 = by_vcpu.iter().map(|&pages| pages as f64).sum();
                100.0 * (1.0 - wrote / freely.iter().sum::<f64>())
            }
        }
    }

    /// The shares with which all vCPUs together would have written `percent` less than if they had
    /// run freely, given that each wrote so many pages with these.
    ///
    /// Nobody may write more than a certain number of pages, so that those that write most are
    /// slowed down first and most, and none that writes less than that. A share never falls: who
    /// was slowed down would write again.
    pub(super) fn slowed(&self, by_vcpu: &[u64], percent: u8) -> Self {
        let Some(freely) = self.freely(by_vcpu) else {
            return match by_vcpu.len().max(self.each().len()) {
                0 => Self::Alike(percent.max(self.most())),
                vcpus => Self::Each((0..vcpus).map(|vcpu| percent.max(self.of(vcpu))).collect()),
            };
        };
        let allowed = freely.iter().sum::<f64>() * (1.0 - f64::from(percent) / 100.0);
        let level = level(&freely, allowed);
        let share = |(vcpu, &pages): (usize, &f64)| part_above(pages, level).max(self.of(vcpu));
        Self::Each(freely.iter().enumerate().map(share).collect())
    }

    /// How many pages each would have written if it had run all the time; none if nobody is known
    /// to have written any.
    fn freely(&self, by_vcpu: &[u64]) -> Option<Vec<f64>> {
        let runs = |vcpu| 1.0 - f64::from(self.of(vcpu).min(MOST)) / 100.0;
        let freely = by_vcpu.iter().enumerate().map(|(vcpu, &pages)| pages as f64 / runs(vcpu));
        by_vcpu.iter().any(|&pages| pages > 0).then(|| freely.collect())
    }
}

/// What each of `amounts` may be at most for their sum to be `allowed`.
fn level(amounts: &[f64], allowed: f64) -> f64 {
    let mut sorted = amounts.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut left = allowed;
    for (below, &amount) in sorted.iter().enumerate() {
        let even = left / (sorted.len() - below) as f64;
        if amount > even {
            return even;
        }
        left -= amount;
    }
    f64::INFINITY
}

/// How much of `amount` is above `level`, in whole percent.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast of a fraction saturates"
)]
fn part_above(amount: f64, level: f64) -> u8 {
    let percent = 100.0 * (1.0 - level / amount.max(f64::MIN_POSITIVE));
    (percent.round() as u8).min(MOST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn each(shares: &[u8]) -> Shares {
        Shares::Each(shares.to_vec())
    }

    #[test]
    fn one_writer_of_four_is_slowed_down_alone() {
        for percent in [20, 60, 99] {
            let slowed = Shares::NONE.slowed(&[0, 0, 5000, 0], percent);
            assert_eq!(slowed, each(&[0, 0, percent, 0]));
            assert!((slowed.effect(&[0, 0, 5000, 0]) - f64::from(percent)).abs() < 1e-6);
        }
        // The others write a little, as every kernel does.
        let slowed = Shares::NONE.slowed(&[30, 10, 5000, 20], 95);
        assert_eq!(slowed, each(&[0, 0, 96, 0]));
    }

    #[test]
    fn those_that_write_most_are_slowed_down_first_and_most() {
        let slowed = Shares::NONE.slowed(&[810, 400, 100], 20);
        assert_eq!(slowed, each(&[32, 0, 0]), "810 of 1310 become 548");
        let slowed = Shares::NONE.slowed(&[810, 400, 100], 60);
        assert_eq!(slowed, each(&[74, 47, 0]), "524 are left: 212 and 212 and 100");
        assert_eq!(Shares::NONE.slowed(&[7, 7, 7, 7], 40), each(&[40; 4]));
    }

    #[test]
    fn who_wrote_little_for_being_slowed_down_is_not_let_go() {
        let now = each(&[90, 0]);
        assert!((now.effect(&[100, 1000]) - 45.0).abs() < 1e-6, "of 2000 it wrote 1100");
        let slowed = now.slowed(&[100, 1000], 60);
        assert_eq!(slowed, each(&[90, 60]));
        let slowed = now.slowed(&[0, 1000], 60);
        assert_eq!(slowed, each(&[90, 60]), "even if it writes nothing more");
    }

    #[test]
    fn all_are_slowed_down_alike_while_nobody_is_known_to_write() {
        assert_eq!(Shares::Alike(20).slowed(&[], 40), Shares::Alike(40));
        assert_eq!(Shares::Alike(20).slowed(&[0, 0], 40), each(&[40, 40]));
        assert_eq!(each(&[50, 0]).slowed(&[0, 0], 40), each(&[50, 40]));
        assert_eq!(each(&[50, 0]).slowed(&[], 40), each(&[50, 40]));
    }

    proptest! {
        #[test]
        fn shares_have_the_effect_that_is_wanted_and_never_fall(
            (before, by_vcpu) in (1..9usize).prop_flat_map(|vcpus| (
                prop::collection::vec(0..=99u8, vcpus),
                prop::collection::vec(prop_oneof![Just(0), 0..1000u64, any::<u64>()], vcpus),
            )),
            percent in 1..=99u8,
        ) {
            let before = Shares::Each(before);
            let after = before.slowed(&by_vcpu, percent);
            let vcpus = 0..by_vcpu.len();
            prop_assert!(vcpus.clone().all(|vcpu| after.of(vcpu) >= before.of(vcpu)));
            prop_assert!(after.most() <= MOST);
            if let Some(freely) = before.freely(&by_vcpu) {
                let all: f64 = freely.iter().sum();
                let runs = |vcpu| 1.0 - f64::from(after.of(vcpu)) / 100.0;
                let then: f64 = vcpus.map(|vcpu| freely[vcpu] * runs(vcpu)).sum();
                // A share is a whole number of percent, and not one hundred.
                prop_assert!(then <= all * (1.01 - f64::from(percent) / 100.0), "{after:?}");
            }
        }
    }
}
