//! What ways to make disks can do on a host, and in what they differ.

use std::{collections::BTreeMap, fmt};

use qvd_core::{Missing, Support};
use serde::Serialize;

/// One thing that a way to make disks may be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DiskCapability {
    /// It works at all on this host and directory.
    Disks,
    /// Disposable disks are had without waiting for storage.
    Volatile,
    /// Kept disks survive a crash of the host.
    Durable,
    /// A disk takes space for what is written to it alone.
    Thin,
    /// Space comes back when the user of a disk discards blocks.
    Discard,
    /// A kept disk can grow.
    Resize,
    /// What a disk has changed can be written to its base.
    Commit,
    /// A disk can be put on another base.
    Rebase,
    /// Disks of a base share the host's page cache of what they have not changed.
    SharedCache,
    /// Making a disk costs the same whatever the base's size.
    ConstantCreate,
    /// Removing a disk returns at once whatever its size.
    ConstantDelete,
    /// A disk that is in use by a virtual machine is noticed.
    NoticedUse,
    /// It works without being root.
    Unprivileged,
}

impl DiskCapability {
    /// All of them, in the order of a table's columns.
    pub const ALL: [Self; 13] = [
        Self::Disks,
        Self::Volatile,
        Self::Durable,
        Self::Thin,
        Self::Discard,
        Self::Resize,
        Self::Commit,
        Self::Rebase,
        Self::SharedCache,
        Self::ConstantCreate,
        Self::ConstantDelete,
        Self::NoticedUse,
        Self::Unprivileged,
    ];

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disks => "disks",
            Self::Volatile => "volatile",
            Self::Durable => "durable",
            Self::Thin => "thin",
            Self::Discard => "discard",
            Self::Resize => "resize",
            Self::Commit => "commit",
            Self::Rebase => "rebase",
            Self::SharedCache => "shared page cache",
            Self::ConstantCreate => "constant-time create",
            Self::ConstantDelete => "constant-time delete",
            Self::NoticedUse => "use is noticed",
            Self::Unprivileged => "without root",
        }
    }
}

impl fmt::Display for DiskCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a way to make disks can do on one host and directory, each found by trying.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
#[serde(transparent)]
pub struct DiskCapabilities(BTreeMap<DiskCapability, Support>);

impl DiskCapabilities {
    /// The same answer to everything: a beginning.
    #[must_use]
    pub fn all(answer: &Support) -> Self {
        Self(DiskCapability::ALL.into_iter().map(|capability| (capability, answer.clone())).collect())
    }

    /// The answer to one question.
    #[must_use]
    pub fn get(&self, capability: DiskCapability) -> Support {
        let unknown = || Support::No(Missing::Design("this back end was not asked about it".to_owned()));
        self.0.get(&capability).cloned().unwrap_or_else(unknown)
    }

    /// Notes an answer.
    pub fn set(&mut self, capability: DiskCapability, support: Support) -> &mut Self {
        self.0.insert(capability, support);
        self
    }

    /// Whether disks can be made at all.
    #[must_use]
    pub fn works(&self) -> bool {
        self.get(DiskCapability::Disks).is_yes()
    }

    /// Every answer, in the order of [`DiskCapability::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (DiskCapability, Support)> + '_ {
        DiskCapability::ALL.into_iter().map(|capability| (capability, self.get(capability)))
    }
}

/// One thing that callers may expect of disks, and that a back end by its nature
/// cannot give. Each declares its own, and the conformance suite checks that
/// these are exactly what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DiskDeviation {
    /// A base that is itself a qcow2 file is refused.
    RawBasesOnly,
    /// Sizes are rounded up to more than a sector.
    CoarseSizes,
    /// A disk can be removed under its user: the caller has to know.
    UnnoticedUse,
}

impl DiskDeviation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::RawBasesOnly, Self::CoarseSizes, Self::UnnoticedUse];

    /// What it means, in a line for a person.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::RawBasesOnly => "bases have to be raw disks",
            Self::CoarseSizes => "sizes are rounded up to more than a sector",
            Self::UnnoticedUse => "a disk in use is not noticed",
        }
    }
}

impl fmt::Display for DiskDeviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
