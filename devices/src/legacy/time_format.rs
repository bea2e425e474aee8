//! Times as the registers of the MC146818 show them: BCD or binary, 24 or 12 hours.

use super::calendar::DateTime;

/// Seconds, minutes, hours, day of the week, day, month, year, century.
pub(super) type Fields = [u8; 8];

/// The data mode bit of register B: binary if set, else BCD.
pub(super) const BINARY: u8 = 1 << 2;
/// The 24/12 bit of register B: 24 hours if set.
pub(super) const HOURS_24: u8 = 1 << 1;
const PM: u8 = 0x80;

/// How register B wants its numbers.
#[derive(Clone, Copy)]
pub(super) struct Format(pub(super) u8);

impl Format {
    /// A number below 100.
    pub(super) fn number(self, value: u8) -> u8 {
        if self.0 & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    /// An hour below 24.
    pub(super) fn hour(self, hour: u8) -> u8 {
        if self.0 & HOURS_24 != 0 {
            return self.number(hour);
        }
        let half = if hour >= 12 { PM } else { 0 };
        self.number((hour + 11) % 12 + 1) | half
    }

    fn parse(self, byte: u8) -> Option<u8> {
        if self.0 & BINARY != 0 {
            return (byte < 100).then_some(byte);
        }
        (byte & 0x0f < 10 && byte >> 4 < 10).then_some((byte >> 4) * 10 + (byte & 0x0f))
    }

    fn parse_hour(self, byte: u8) -> Option<u8> {
        if self.0 & HOURS_24 != 0 {
            return self.parse(byte);
        }
        let hour = self.parse(byte & !PM)?;
        let afternoon = if byte & PM == 0 { 0 } else { 12 };
        (1..=12).contains(&hour).then_some(hour % 12 + afternoon)
    }

    /// `seconds` since 1970 as the chip shows them; years repeat after 10000.
    pub(super) fn encode(self, seconds: i64) -> Fields {
        let DateTime { year, month, day, hour, minute, second } = DateTime::from_unix(seconds);
        let [century, year] = [year.div_euclid(100), year].map(|value| {
            u8::try_from(value.rem_euclid(100)).expect("a remainder of 100 is below it")
        });
        [
            self.number(second),
            self.number(minute),
            self.hour(hour),
            DateTime::weekday(seconds),
            self.number(day),
            self.number(month),
            self.number(year),
            self.number(century),
        ]
    }

    /// Seconds since 1970; none if the fields show no time. The day of the week follows from it.
    pub(super) fn decode(self, fields: Fields) -> Option<i64> {
        let [second, minute, hour, _, day, month, year, century] = fields;
        let year = i64::from(self.parse(century)?) * 100 + i64::from(self.parse(year)?);
        let (month, day) = (self.parse(month)?, self.parse(day)?);
        let (minute, second) = (self.parse(minute)?, self.parse(second)?);
        DateTime { year, month, day, hour: self.parse_hour(hour)?, minute, second }.to_unix()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_same_moment_in_every_format() {
        let afternoon = 951_831_296; // 2000-02-29 13:34:56, a Tuesday
        for (mode, fields) in [
            (HOURS_24, [0x56, 0x34, 0x13, 3, 0x29, 0x02, 0x00, 0x20]),
            (0, [0x56, 0x34, 0x81, 3, 0x29, 0x02, 0x00, 0x20]),
            (BINARY | HOURS_24, [56, 34, 13, 3, 29, 2, 0, 20]),
            (BINARY, [56, 34, 0x81, 3, 29, 2, 0, 20]),
        ] {
            assert_eq!(Format(mode).encode(afternoon), fields);
            assert_eq!(Format(mode).decode(fields), Some(afternoon));
        }
    }

    #[test]
    fn midnight_and_noon_are_twelve() {
        assert_eq!([0, 11, 12, 23].map(|hour| Format(0).hour(hour)), [0x12, 0x11, 0x92, 0x91]);
    }

    #[test]
    fn digits_that_are_none_show_no_time() {
        let mut fields = Format(HOURS_24).encode(0);
        fields[0] = 0x0a;
        assert_eq!(Format(HOURS_24).decode(fields), None);
        let mut fields = Format(0).encode(0);
        fields[2] = 0;
        assert_eq!(Format(0).decode(fields), None);
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(mode in any::<u8>(), t in -60_000_000_000i64..250_000_000_000) {
            prop_assert_eq!(Format(mode).decode(Format(mode).encode(t)), Some(t));
        }

        #[test]
        fn any_fields_are_survived(mode in any::<u8>(), fields in any::<Fields>()) {
            let _ = Format(mode).decode(fields);
        }
    }
}
