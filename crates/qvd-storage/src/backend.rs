//! The contract between those who make writable roots and those who use them.

use std::{
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

use qvd_core::{DesktopId, Digest, RootPolicy, Support};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Keeps writable roots on base trees.
///
/// Calls may come from many threads at once. Two calls about the same root
/// have to be serialised by the caller, who knows what its desktop is doing.
pub trait RootBackend: fmt::Debug + Send + Sync {
    /// Name written to state files, so never changed once released.
    fn name(&self) -> &'static str;

    /// What this back end can do on *this* host, found by doing it.
    ///
    /// # Errors
    /// It could not be found out: a full disk says nothing about the host.
    fn capabilities(&self) -> Result<Capabilities, Error>;

    /// Makes a root on `base`, or finds the one that is there: also that of a
    /// desktop which a killed process left running, so nothing in it changes.
    ///
    /// # Errors
    /// [`Error::OtherBase`] when a persistent root stands on another image.
    fn create(&self, base: &BaseTree, id: &RootId, policy: RootPolicy) -> Result<Box<dyn Root>, Error>;

    /// Removes a root for good. Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// [`Error::RootBusy`] while something has it mounted.
    fn remove(&self, id: &RootId) -> Result<(), Error>;

    /// Every root on this host, by name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// The directory of roots cannot be read.
    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error>;
}

/// The writable file tree of one desktop.
#[must_use = "dropping it keeps the root on disk, also a volatile one"]
pub trait Root: fmt::Debug + Send + Sync {
    /// Which root this is.
    fn id(&self) -> &RootId;

    /// Makes a detached mount of the root; a volatile one begins from the base
    /// anew. With `idmap`, owners show shifted by that user namespace's maps.
    /// The mount is in no mount table and gone once it is closed everywhere.
    ///
    /// # Errors
    /// [`Error::RootBusy`] when it is mounted already, [`Error::Unsupported`]
    /// when this host cannot do it.
    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error>;

    /// Says that nobody uses the root any more: a volatile one is forgotten, a
    /// persistent one kept. Closing again is `Ok`; after an error, closing
    /// again tries again.
    ///
    /// # Errors
    /// [`Error::RootBusy`] while something still has it mounted.
    fn close(&mut self) -> Result<(), Error>;
}

/// What a back end can do on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// Whether roots can be mounted at all.
    pub roots: Support,
    /// Whether one image can serve desktops with different ranges of ids.
    pub id_mapped: Support,
    /// Whether disposable roots can be had without writing them to disk in time.
    pub volatile: Support,
}

/// A read-only tree that roots stand on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseTree {
    digest: Digest,
    dir: PathBuf,
}

impl BaseTree {
    /// The tree in `dir`, whose content is known by `digest`. Nobody may change
    /// it while roots stand on it.
    #[must_use]
    pub fn new(digest: Digest, dir: impl Into<PathBuf>) -> Self {
        Self { digest, dir: dir.into() }
    }

    /// What its content is known by.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

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
