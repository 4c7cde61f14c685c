//! Names of disks.

use std::{fmt, str::FromStr};

use qvd_core::DesktopId;
use serde::{Deserialize, Serialize};

use crate::RootId;

/// Name of a disk: up to 64 of `a-z 0-9 _ -`, beginning with a letter or a
/// digit. Desktops use their number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(RootId);

/// Why a text is not a disk's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a disk's name: use up to 64 of a-z 0-9 _ - and start with a letter or a digit", .0.escape_default())]
pub struct DiskIdError(String);

impl DiskId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl From<DesktopId> for DiskId {
    fn from(id: DesktopId) -> Self {
        Self(id.into())
    }
}

impl FromStr for DiskId {
    type Err = DiskIdError;
    fn from_str(text: &str) -> Result<Self, DiskIdError> {
        text.parse().map(Self).map_err(|_| DiskIdError(text.chars().take(80).collect()))
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
