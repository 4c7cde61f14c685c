//! What disks stand on.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use qvd_core::Digest;
use serde::{Deserialize, Serialize};

/// How the bytes of a disk are in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DiskFormat {
    /// One after the other.
    Raw,
    /// As QEMU's copy-on-write format, version 2 or 3, has them.
    Qcow2,
}

impl DiskFormat {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a text is not a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a disk's format: use raw or qcow2", .0.escape_default())]
pub struct DiskFormatError(String);

impl FromStr for DiskFormat {
    type Err = DiskFormatError;
    fn from_str(text: &str) -> Result<Self, DiskFormatError> {
        [Self::Raw, Self::Qcow2]
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| DiskFormatError(text.chars().take(32).collect()))
    }
}

/// A read-only disk that disks stand on: a file or a block device. Nobody may
/// change it while they do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BaseDisk {
    digest: Digest,
    path: PathBuf,
    format: DiskFormat,
}

impl BaseDisk {
    /// The disk in the file `path`, whose content is known by `digest`. The format
    /// is said, never guessed: a guess could be misled by what is on the disk.
    #[must_use]
    pub fn new(digest: Digest, path: impl Into<PathBuf>, format: DiskFormat) -> Self {
        Self { digest, path: path.into(), format }
    }

    /// What its content is known by.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How its bytes are in its file.
    #[must_use]
    pub const fn format(&self) -> DiskFormat {
        self.format
    }
}
