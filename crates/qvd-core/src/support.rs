//! Answers of probes.

use std::fmt;

use serde::Serialize;

/// One answer about this host. Never a bare `bool`: a no says what is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Support {
    /// It was tried and works.
    Yes,
    /// It was tried and does not work, for want of this.
    No(Missing),
}

impl Support {
    /// Whether it works.
    #[must_use]
    pub const fn is_yes(&self) -> bool {
        matches!(self, Self::Yes)
    }
}

/// What a host lacks, in words that tell an administrator what to get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Missing {
    /// The kernel was built without it, is too old, or has it switched off.
    Kernel(String),
    /// The file system of the directory in question cannot do it.
    Filesystem(String),
    /// This process may not; it names the privilege.
    Privilege(String),
    /// A program is not installed; it names the program and its package.
    Program(String),
    /// A file is not there; it names what it is and where it was looked for.
    File(String),
    /// A device is absent or does not work.
    Device(String),
    /// It cannot work that way whatever the host; it names why.
    Design(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(what) => write!(f, "the kernel lacks {what}"),
            Self::Filesystem(what) => write!(f, "the file system lacks {what}"),
            Self::Privilege(what) => write!(f, "this process may not {what}"),
            Self::Program(what) => write!(f, "program {what} is not installed"),
            Self::File(what) => write!(f, "there is no {what}"),
            Self::Device(what) => write!(f, "device {what} is not usable"),
            Self::Design(why) => write!(f, "by its nature, {why}"),
        }
    }
}
