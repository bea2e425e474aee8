//! Where a migration comes from or goes to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// An end of a migration: `tcp:HOST:PORT` (`tcp:` may be left out) or `unix:PATH`.
///
/// An IPv6 address is written in brackets, `[::1]:4444`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A TCP port. Names are resolved when the connection is made, not here.
    Tcp {
        /// A name or an IP address, without brackets. Never empty.
        host: String,
        /// The port; 0 lets a listener take any free one.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddressError {
    /// There is no `HOST:PORT` in it.
    #[error("{0:?} is not an address: write HOST:PORT, tcp:HOST:PORT or unix:PATH")]
    Malformed(String),
    /// What follows the last colon is not a port.
    #[error("{port:?} in {text:?} is not a port: write a number from 0 to 65535")]
    Port {
        /// The whole text.
        text: String,
        /// The part of it that should be a port.
        port: String,
    },
    /// An IPv6 address whose end cannot be told from the port.
    #[error("{0:?} is ambiguous: write an IPv6 address in brackets, such as [::1]:4444")]
    Brackets(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed = || AddressError::Malformed(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() || path.contains('\0') {
                Err(malformed())
            } else {
                Ok(Address::Unix(path.into()))
            };
        }
        let rest = text.strip_prefix("tcp:").unwrap_or(text);
        let (host, port) = rest.rsplit_once(':').ok_or_else(malformed)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(inside) => inside,
            None if host.contains(':') => return Err(AddressError::Brackets(text.to_owned())),
            None => host,
        };
        let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '[' | ']' | '/');
        if host.is_empty() || host.contains(odd) {
            return Err(malformed());
        }
        let wrong = || AddressError::Port { text: text.to_owned(), port: port.to_owned() };
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        Ok(Address::Tcp { host: host.to_owned(), port: port.parse().map_err(|_| wrong())? })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn every_documented_form_is_understood() {
        for (text, address) in [
            ("tcp:10.0.0.2:4444", tcp("10.0.0.2", 4444)),
            ("10.0.0.2:4444", tcp("10.0.0.2", 4444)),
            ("other-host:0", tcp("other-host", 0)),
            ("[::1]:4444", tcp("::1", 4444)),
            ("tcp:[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)),
            ("unix:/run/m.sock", Address::Unix("/run/m.sock".into())),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in ["", "host", "tcp:", "tcp:4444", ":4444", "unix:", "[]:1", "a b:1", "[a:1"] {
            let malformed = Err(AddressError::Malformed(text.into()));
            assert_eq!(text.parse::<Address>(), malformed, "{text}");
        }
        assert!(matches!("::1:4444".parse::<Address>(), Err(AddressError::Brackets(_))));
        for text in ["host:", "host:65536", "host:-1", "host:+1", "host:http"] {
            assert!(matches!(text.parse::<Address>(), Err(AddressError::Port { .. })), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_survives_being_written_and_read(
            text in r"(tcp:|unix:)?\[?[a-z0-9.:/%-]{0,12}\]?:[0-9]{1,6}"
        ) {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<Address>();
        }
    }
}
