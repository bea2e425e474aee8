//! Spans of time, as people write them.

use std::time::Duration;

/// Reads `300ms`, `2s` or `1m`.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let milliseconds = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    let product = number.zip(milliseconds).and_then(|(number, unit)| number.checked_mul(unit));
    product.map(Duration::from_millis).ok_or_else(|| {
        format!("{text:?} is not a time: write a number and a unit, such as 300ms or 2s")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_time_needs_a_number_and_a_unit() {
        assert_eq!(parse("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse("1m"), Ok(Duration::from_secs(60)));
        for text in ["", "3", "ms", "-1s", "1.5s", "1 s", "3h", "99999999999999999999ms"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(&format!("{}m", u64::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = parse(&text);
        }
    }
}
