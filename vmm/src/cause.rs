//! An error and its causes, on one line.

use std::error::Error;

/// `what: cause: cause`, on one line whatever the messages hold.
///
/// A cause that its error's own message already ends with is not repeated.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    one_line(&text)
}

/// The text without anything that would move the cursor or break the line.
#[must_use]
pub fn one_line(text: &str) -> String {
    let spaced: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    spaced.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot boot")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read kernel")]
    struct Inner(#[source] io::Error);

    #[test]
    fn causes_follow_on_one_line() {
        let error = Outer(Inner(io::Error::other("disk\nfull\x1b[2J")));
        assert_eq!(chain(&error), "cannot boot: cannot read kernel: disk full [2J");
    }

    #[test]
    fn a_cause_that_was_said_is_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error("it failed: {0}")]
        struct Wrapper(#[source] io::Error);
        assert_eq!(chain(&Wrapper(io::Error::other("no"))), "it failed: no");
    }
}
