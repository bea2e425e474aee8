//! Seconds since 1970 as date and time of day, and back, by the Gregorian calendar.

const DAY: i64 = 86_400;
/// Days from 0000-03-01, where the arithmetic begins its years, to 1970-01-01.
const EPOCH: i64 = 719_468;
/// Days in 400 years, after which the calendar repeats.
const CYCLE: i64 = 146_097;

/// A date and a time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    /// Astronomical year.
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    /// 0 to 23.
    pub(super) hour: u8,
    /// 0 to 59.
    pub(super) minute: u8,
    /// 0 to 59.
    pub(super) second: u8,
}

impl DateTime {
    /// The date and time `seconds` after 1970-01-01 00:00:00.
    #[must_use]
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, of_day) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        let days = days + EPOCH;
        let (cycle, of_cycle) = (days.div_euclid(CYCLE), days.rem_euclid(CYCLE));
        // Leap days are the last days of years that begin in March: take them out, then divide.
        let leaps = of_cycle / 1_460 - of_cycle / 36_524 + of_cycle / (CYCLE - 1);
        let year = (of_cycle - leaps) / 365;
        let of_year = of_cycle - (365 * year + year / 4 - year / 100);
        // From March on the lengths of the months repeat every 153 days.
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        Self {
            year: cycle * 400 + year + next_year,
            month: small(month),
            day: small(day),
            hour: small(of_day / 3600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// Seconds since 1970-01-01 00:00:00; none if there is no such date or time.
    #[must_use]
    pub(super) fn to_unix(self) -> Option<i64> {
        let Self { year, month, day, hour, minute, second } = self;
        let in_range = (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60
            && (-9999..=9999).contains(&year);
        if !in_range {
            return None;
        }
        let (from_march, year) =
            if month > 2 { (i64::from(month) - 3, year) } else { (i64::from(month) + 9, year - 1) };
        let (cycle, of_cycle) = (year.div_euclid(400), year.rem_euclid(400));
        let of_year = (153 * from_march + 2) / 5 + i64::from(day) - 1;
        let days = 365 * of_cycle + of_cycle / 4 - of_cycle / 100 + of_year;
        let time = i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second);
        let seconds = (cycle * CYCLE + days - EPOCH) * DAY + time;
        // The 31st of a shorter month came out as a day of the next one.
        (Self::from_unix(seconds).day == day).then_some(seconds)
    }

    /// The day of the week `seconds` after 1970-01-01, a Thursday: 1 for Sunday to 7.
    #[must_use]
    pub(super) fn weekday(seconds: i64) -> u8 {
        small((seconds.div_euclid(DAY) + 4).rem_euclid(7) + 1)
    }
}

/// A number that the arithmetic keeps below 100.
fn small(value: i64) -> u8 {
    u8::try_from(value).expect("a field of a date is small")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(year: i64, month: u8, day: u8, hour: u8, minute: u8, second: u8) -> DateTime {
        DateTime { year, month, day, hour, minute, second }
    }

    #[test]
    fn well_known_moments_are_right() {
        for (seconds, date) in [
            (0, at(1970, 1, 1, 0, 0, 0)),
            (-1, at(1969, 12, 31, 23, 59, 59)),
            (951_782_400, at(2000, 2, 29, 0, 0, 0)),
            (1_000_000_000, at(2001, 9, 9, 1, 46, 40)),
            (2_147_483_648, at(2038, 1, 19, 3, 14, 8)),
            (4_107_542_400, at(2100, 3, 1, 0, 0, 0)),
        ] {
            assert_eq!(DateTime::from_unix(seconds), date);
            assert_eq!(date.to_unix(), Some(seconds));
        }
        assert_eq!(DateTime::weekday(0), 5);
        assert_eq!(DateTime::weekday(951_782_400), 3);
    }

    #[test]
    fn dates_that_do_not_exist_are_none() {
        for date in [
            at(2023, 2, 29, 0, 0, 0),
            at(2100, 2, 29, 0, 0, 0),
            at(2024, 4, 31, 0, 0, 0),
            at(2024, 0, 1, 0, 0, 0),
            at(2024, 13, 1, 0, 0, 0),
            at(2024, 1, 0, 0, 0, 0),
            at(2024, 1, 1, 24, 0, 0),
            at(2024, 1, 1, 0, 60, 0),
            at(2024, 1, 1, 0, 0, 60),
            at(i64::MAX, 1, 1, 0, 0, 0),
        ] {
            assert_eq!(date.to_unix(), None, "{date:?}");
        }
    }

    #[test]
    fn every_day_of_a_cycle_follows_the_one_before() {
        let mut before = DateTime::from_unix(-DAY);
        for day in 0..CYCLE {
            let date = DateTime::from_unix(day * DAY);
            let next = if date.day > 1 {
                (before.year, before.month, before.day + 1)
            } else if date.month > 1 {
                (before.year, before.month + 1, 1)
            } else {
                (before.year + 1, 1, 1)
            };
            assert_eq!((date.year, date.month, date.day), next);
            assert!(date.day > 1 || before.day >= 28);
            before = date;
        }
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(seconds in -300_000_000_000i64..250_000_000_000) {
            prop_assert_eq!(DateTime::from_unix(seconds).to_unix(), Some(seconds));
        }
    }
}
