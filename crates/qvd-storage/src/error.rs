//! What this crate reports.

use std::{
    io,
    path::{Path, PathBuf},
};

use qvd_core::{Digest, ErrorKind, FlavourName, Missing, Tag};
use qvd_sys::mount::MountError;

use crate::{DiskId, RootId, TreeError, qcow2::Fault, repository::CommitId};

/// What this crate reports. `Display` is one line and never repeats the
/// cause: that is what `source()` is for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or system call failed; `op` is our verb, not a system call's name.
    #[error("cannot {op} `{}`", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// This host lacks something. Retrying will not help.
    #[error("cannot {op} on this host: {missing}")]
    Unsupported {
        /// What was tried.
        op: &'static str,
        /// What is missing.
        missing: Missing,
    },
    /// A recipe is wrong.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The tree of a flavour could not be built; the reason names the step.
    #[error("{reason}")]
    Build {
        /// Flavour that was to be built.
        flavour: FlavourName,
        /// What was wrong, in one line.
        reason: String,
        /// The last lines the program wrote, for a person.
        output: Vec<String>,
    },
    /// A recipe names a package that its distribution does not have.
    #[error("there is no package `{package}` in {suite}")]
    NoSuchPackage {
        /// Flavour that was to be built.
        flavour: FlavourName,
        /// Package that is not there.
        package: String,
        /// Suite it was looked for in.
        suite: String,
    },
    /// The file system of the store is full.
    #[error("cannot {op} `{}`: no space is left on its file system", path.display())]
    NoSpace {
        /// What was tried.
        op: &'static str,
        /// File or directory whose file system is full.
        path: PathBuf,
    },
    /// The thin pool that volumes share is full, or nearly.
    #[error("{what} of thin pool {pool} are taken by {percent} %: extend it (`lvextend`), or remove roots or disks")]
    PoolFull {
        /// Group and name of the pool.
        pool: String,
        /// What of it there is no more of.
        what: &'static str,
        /// How much is taken, in percent.
        percent: u64,
    },
    /// An image is not what its name says, or is incomplete.
    #[error("image {digest} is damaged: {reason}")]
    Damaged {
        /// Image in question.
        digest: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such image.
    #[error("there is no image {0}")]
    NoSuchImage(Digest),
    /// There is no image of this flavour.
    #[error("there is no image of flavour {0}")]
    NoSuchFlavour(FlavourName),
    /// Another process works with this store.
    #[error("store `{}` is in use by another process", .0.display())]
    StoreBusy(PathBuf),
    /// A root is mounted already.
    #[error("root {0} is in use")]
    RootBusy(RootId),
    /// A home with a file system of its own is mounted already.
    #[error("home `{}` is in use", .0.display())]
    HomeBusy(PathBuf),
    /// There is no kept root of this name.
    #[error("there is no kept root {0}")]
    NoSuchRoot(RootId),
    /// There is a root of this name already.
    #[error("there is a root {0} already")]
    RootExists(RootId),
    /// A persistent root was made on another image.
    #[error("root {root} was made on image {has}, not on {wanted}")]
    OtherBase {
        /// Root in question.
        root: RootId,
        /// Image that it was made on.
        has: Digest,
        /// Image that was asked for.
        wanted: Digest,
    },
    /// The file of a disk, or one behind it, cannot be used as it is.
    #[error("disk file `{}` is refused: {fault}", path.display())]
    DiskFile {
        /// File in question.
        path: PathBuf,
        /// What is wrong with it, and where.
        fault: Fault,
    },
    /// A virtual machine, or somebody who works on the disk, has it.
    #[error("disk {0} is in use")]
    DiskBusy(DiskId),
    /// As [`Error::DiskBusy`], for a file that is not a back end's.
    #[error("disk file `{}` is in use", .0.display())]
    DiskFileBusy(PathBuf),
    /// A base is to be changed, and another disk would change with it.
    #[error("base `{}` cannot be changed: disk {disk} stands on it too", base.display())]
    BaseShared {
        /// Disk that stands on it.
        disk: DiskId,
        /// File of the base.
        base: PathBuf,
    },
    /// A kept disk was made on another image.
    #[error("disk {disk} was made on image {has}, not on {wanted}")]
    OtherBaseDisk {
        /// Disk in question.
        disk: DiskId,
        /// Image that it was made on.
        has: Digest,
        /// Image that was asked for.
        wanted: Digest,
    },
    /// There is no back end of this name.
    #[error("there is no back end `{name}`; there are {}", known.join(", "))]
    NoSuchBackend {
        /// Name that was asked for.
        name: String,
        /// Names that there are.
        known: Vec<String>,
    },
    /// A program of the host failed.
    #[error("cannot {op}: {program} {reason}")]
    Program {
        /// What was tried.
        op: &'static str,
        /// Name of the program.
        program: &'static str,
        /// What it said, in one line.
        reason: String,
    },
    /// Something in a repository is missing, or not what its name says.
    #[error("{what} is damaged: {reason}")]
    DamagedPart {
        /// What it is, with its name.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A flavour has no such tag.
    #[error("flavour {flavour} has no tag `{tag}`; it has {}", known.join(", "))]
    NoSuchTag {
        /// Flavour in question.
        flavour: FlavourName,
        /// Tag that was asked for.
        tag: Tag,
        /// Tags that there are.
        known: Vec<String>,
    },
    /// A flavour has no commit whose id begins so.
    #[error("flavour {flavour} has no commit {digits}")]
    NoSuchCommit {
        /// Flavour in question.
        flavour: FlavourName,
        /// How the id begins.
        digits: String,
    },
    /// Somebody else moved a tag between our look at it and our move.
    #[error("tag `{tag}` of flavour {flavour} was moved meanwhile")]
    TagMoved {
        /// Flavour in question.
        flavour: FlavourName,
        /// Tag in question.
        tag: Tag,
    },
    /// The policy of the repository does not let a commit be used.
    #[error("commit {commit} is refused by the policy of its repository: {reason}")]
    Untrusted {
        /// Commit in question.
        commit: CommitId,
        /// What is missing.
        reason: String,
    },
    /// A tree cannot be as it was given.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// What was to be imported is refused.
    #[error("cannot import `{}`: {reason}", from.display())]
    Import {
        /// File or directory in question.
        from: PathBuf,
        /// What is wrong with it, and where in it.
        reason: String,
    },
    /// What was asked for makes no sense, or policy forbids it.
    #[error("{0}")]
    Refused(String),
    /// The program that served a root has ended under it: who has the root
    /// mounted gets `ENOTCONN` for everything. It can be mounted again.
    #[error("root {root} is dead: {program} (process {pid}) {how}")]
    ServerDied {
        /// Root that it served.
        root: RootId,
        /// Name of the program.
        program: String,
        /// Number that the process had.
        pid: u32,
        /// How it ended.
        how: String,
    },
    /// A root or a home could not be mounted.
    #[error("cannot mount {what}")]
    Mount {
        /// What was to be mounted.
        what: String,
        /// What the kernel said.
        source: MountError,
    },
}

impl Error {
    /// What the caller can make of it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Recipe(_)
            | Self::NoSuchPackage { .. }
            | Self::OtherBase { .. }
            | Self::OtherBaseDisk { .. }
            | Self::DiskFile { .. }
            | Self::NoSuchBackend { .. }
            | Self::Tree(_)
            | Self::Import { .. }
            | Self::Refused(_)
            | Self::RootExists(_) => ErrorKind::Invalid,
            Self::NoSuchImage(_)
            | Self::NoSuchFlavour(_)
            | Self::NoSuchRoot(_)
            | Self::NoSuchTag { .. }
            | Self::NoSuchCommit { .. } => ErrorKind::NotFound,
            Self::StoreBusy(_)
            | Self::RootBusy(_)
            | Self::HomeBusy(_)
            | Self::DiskBusy(_)
            | Self::DiskFileBusy(_)
            | Self::BaseShared { .. }
            | Self::TagMoved { .. } => ErrorKind::Busy,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Io { .. }
            | Self::Build { .. }
            | Self::NoSpace { .. }
            | Self::PoolFull { .. }
            | Self::Program { .. }
            | Self::ServerDied { .. }
            | Self::Damaged { .. }
            | Self::DamagedPart { .. }
            | Self::Untrusted { .. }
            | Self::Mount { .. } => ErrorKind::Failed,
        }
    }

    /// For `map_err`: an input/output error with our verb and the object. A
    /// full disk becomes [`Error::NoSpace`].
    pub(crate) fn io<E: Into<io::Error>>(op: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> Self {
        move |source| {
            let (source, path) = (source.into(), path.as_ref().to_path_buf());
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { op, path },
                _ => Self::Io { op, path, source },
            }
        }
    }
}

/// Why a text is not a recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("recipe is wrong at line {line}, column {column}: {reason}")]
pub struct RecipeError {
    /// Line, counted from one.
    pub line: usize,
    /// Column in characters, counted from one.
    pub column: usize,
    /// What is wrong.
    pub reason: String,
}
