//! Where a root is not quite what a plain file system is.

use std::fmt;

use serde::Serialize;

/// One thing that programs may expect of a file system, or callers of a back
/// end, and that a back end by its nature cannot give. Each declares its own,
/// and the conformance suite checks that these are exactly what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Deviation {
    /// Who opened a file of the base for reading before it was first written
    /// does not see what is written.
    StaleReaders,
    /// Who mapped a file of the base before it was first written does not see
    /// what is written.
    StaleMaps,
    /// A program of the base can be written to while it runs.
    WritableText,
    /// Names of one file of the base become files of their own when written.
    BrokenHardLinks,
    /// A directory of the base cannot be renamed in one step (`EXDEV`).
    NoDirectoryRename,
    /// The number of a file of the base changes when it is first written.
    ChangingInodes,
    /// Reading a file of the base does not move its time of access.
    FrozenAccessTimes,
    /// No files without a name (`O_TMPFILE`).
    NoTmpfile,
    /// No access control lists.
    NoAcls,
    /// No capabilities on files.
    NoFileCapabilities,
    /// No attributes of the `user` and `trusted` namespaces.
    NoXattrs,
    /// Changes are not told to those who watch (`inotify`).
    NoNotify,
    /// Two names cannot be exchanged in one step.
    NoExchange,
    /// Holes in files of the base are filled, at least in part, when they are
    /// first written.
    FilledHoles,
    /// Some directories of the base cannot be written to.
    ReadOnlyParts,
    /// A root that is mounted can be mounted again, closed or removed under
    /// its user: the caller has to know.
    UnnoticedUse,
    /// The case of this name of the conformance suite is not passed: for what a
    /// program of others gets wrong and nobody else does.
    Case(&'static str),
}

impl Deviation {
    /// All of them that have a name of their own.
    pub const ALL: [Self; 16] = [
        Self::StaleReaders,
        Self::StaleMaps,
        Self::WritableText,
        Self::BrokenHardLinks,
        Self::NoDirectoryRename,
        Self::ChangingInodes,
        Self::FrozenAccessTimes,
        Self::NoTmpfile,
        Self::NoAcls,
        Self::NoFileCapabilities,
        Self::NoXattrs,
        Self::NoNotify,
        Self::NoExchange,
        Self::FilledHoles,
        Self::ReadOnlyParts,
        Self::UnnoticedUse,
    ];

    /// What it means, in a line for a person.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::StaleReaders => "a reader of an image's file misses what is written to it first",
            Self::StaleMaps => "a mapping of an image's file misses what is written to it first",
            Self::WritableText => "a running program of the image can be written to",
            Self::BrokenHardLinks => "hard links of the image part when written to",
            Self::NoDirectoryRename => "directories of the image are copied instead of renamed",
            Self::ChangingInodes => "an image's file changes its number when first written",
            Self::FrozenAccessTimes => "reading an image's file leaves its time of access",
            Self::NoTmpfile => "no files without a name",
            Self::NoAcls => "no access control lists",
            Self::NoFileCapabilities => "no capabilities on files",
            Self::NoXattrs => "no extended attributes",
            Self::NoNotify => "changes are not notified",
            Self::NoExchange => "names cannot be exchanged",
            Self::FilledHoles => "holes of an image's file are filled in part when first written",
            Self::ReadOnlyParts => "parts of the image cannot be written to",
            Self::UnnoticedUse => "a root in use is not noticed",
            Self::Case(_) => "does something else than a plain directory",
        }
    }
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Case(name) => write!(f, "{} in the case `{name}`", self.text()),
            _ => f.write_str(self.text()),
        }
    }
}
