//! Names of roots.

use std::{fmt, str::FromStr};

use qvd_core::DesktopId;
use serde::{Deserialize, Serialize};

/// Name of a root: up to 64 of `a-z 0-9 _ -`, beginning with a letter or a
/// digit. Desktops use their number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RootId(String);

/// Why a text is not a root's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a root's name: use up to 64 of a-z 0-9 _ - and start with a letter or a digit", .0.escape_default())]
pub struct RootIdError(String);

impl RootId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<DesktopId> for RootId {
    fn from(id: DesktopId) -> Self {
        Self(id.to_string())
    }
}

impl From<RootId> for String {
    fn from(id: RootId) -> Self {
        id.0
    }
}

impl TryFrom<String> for RootId {
    type Error = RootIdError;
    fn try_from(text: String) -> Result<Self, RootIdError> {
        text.parse()
    }
}

impl FromStr for RootId {
    type Err = RootIdError;
    fn from_str(text: &str) -> Result<Self, RootIdError> {
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b));
        if first && rest && text.len() <= 64 {
            Ok(Self(text.to_owned()))
        } else {
            Err(RootIdError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
