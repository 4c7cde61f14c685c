//! What back ends can do on a host.

use std::{collections::BTreeMap, fmt};

use qvd_core::{Missing, Support};
use serde::Serialize;

/// One thing that a back end may be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Capability {
    /// It works at all on this host and directory.
    Roots,
    /// One base can serve desktops with different ranges of ids.
    IdMapped,
    /// Disposable roots are had without waiting for a disk.
    Volatile,
    /// Kept roots survive a crash of the host.
    Durable,
    /// A root can be copied in constant time.
    Snapshots,
    /// A limit in bytes holds.
    QuotaBytes,
    /// A limit in files holds.
    QuotaInodes,
    /// Two roots share the page cache of the base's files.
    SharedCache,
    /// Two roots that map a file of the base share its memory.
    SharedMmaps,
    /// Making a root costs the same whatever the base's size.
    ConstantCreate,
    /// Removing a root returns at once whatever its size.
    ConstantDelete,
    /// It works without being root.
    Unprivileged,
}

impl Capability {
    /// All of them, in the order of a table's columns.
    pub const ALL: [Self; 12] = [
        Self::Roots,
        Self::IdMapped,
        Self::Volatile,
        Self::Durable,
        Self::Snapshots,
        Self::QuotaBytes,
        Self::QuotaInodes,
        Self::SharedCache,
        Self::SharedMmaps,
        Self::ConstantCreate,
        Self::ConstantDelete,
        Self::Unprivileged,
    ];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Roots => "roots",
            Self::IdMapped => "id-mapped",
            Self::Volatile => "volatile",
            Self::Durable => "durable",
            Self::Snapshots => "snapshots",
            Self::QuotaBytes => "quota in bytes",
            Self::QuotaInodes => "quota in inodes",
            Self::SharedCache => "shared page cache",
            Self::SharedMmaps => "shared mmaps",
            Self::ConstantCreate => "constant-time create",
            Self::ConstantDelete => "constant-time delete",
            Self::Unprivileged => "without root",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a back end can do on this host and directory, each found by trying.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
#[serde(transparent)]
pub struct Capabilities(BTreeMap<Capability, Support>);

impl Capabilities {
    /// Nothing is known yet: every answer is a no until it is [`set`](Self::set).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The answer to one question.
    #[must_use]
    pub fn get(&self, capability: Capability) -> Support {
        let unknown = || Support::No(Missing::Design("this back end was not asked about it".to_owned()));
        self.0.get(&capability).cloned().unwrap_or_else(unknown)
    }

    /// Notes an answer.
    pub fn set(&mut self, capability: Capability, support: Support) -> &mut Self {
        self.0.insert(capability, support);
        self
    }

    /// Whether roots can be made at all.
    #[must_use]
    pub fn works(&self) -> bool {
        self.get(Capability::Roots).is_yes()
    }

    /// Every answer, in the order of [`Capability::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Capability, Support)> + '_ {
        Capability::ALL.into_iter().map(|capability| (capability, self.get(capability)))
    }
}
