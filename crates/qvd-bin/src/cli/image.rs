//! `qvd image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use qvd_core::{Bytes, DesktopId, FlavourName, Tag};
use qvd_storage::repository::{Reference, Rollout};

use crate::bisect::Search;

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build the image that a recipe describes
    Build {
        /// Recipe file
        #[arg(value_hint = ValueHint::FilePath)]
        recipe: PathBuf,
        /// Why, for its history
        #[arg(short, long, value_name = "TEXT")]
        message: Option<String>,
    },
    /// List the newest image of every flavour
    Ls,
    /// Make a commit of a directory, a tar archive (gzip, xz, bzip2, zstd), an OCI archive, or a raw or qcow2 disk
    Import(Import),
    /// Make the next version from what a running desktop's root holds, without its secrets
    Commit {
        /// Number of the desktop
        id: DesktopId,
        /// Why
        #[arg(short, long, value_name = "TEXT")]
        message: String,
        /// Flavour that it is the next version of; that of the desktop, unless given
        #[arg(long)]
        flavour: Option<FlavourName>,
        /// Let desktops follow it at once: move the tag `default` too
        #[arg(long)]
        publish: bool,
    },
    /// Show what a flavour's head came from, newest first
    Log {
        /// Flavour, or FLAVOUR:TAG or FLAVOUR@ID to begin there
        image: Reference,
    },
    /// Show all about a commit
    Show {
        /// FLAVOUR, FLAVOUR:TAG or FLAVOUR@ID
        image: Reference,
    },
    /// Show the files and packages that differ between two commits
    Diff {
        /// The older one
        from: Reference,
        /// The newer one
        to: Reference,
    },
    /// Put a tag on a commit, or list tags
    Tag {
        /// Flavour
        flavour: FlavourName,
        /// Tag; without one, all are listed
        name: Option<Tag>,
        /// Id of the commit, or a tag that is on it; head, unless given
        id: Option<String>,
        /// Why, for the reflog
        #[arg(short, long, value_name = "TEXT", default_value = "tagged")]
        message: String,
        #[command(flatten)]
        steps: Steps,
    },
    /// Remove a tag
    Untag {
        /// Flavour
        flavour: FlavourName,
        /// Tag
        name: Tag,
    },
    /// Show where a tag has been, newest first
    Reflog {
        /// FLAVOUR or FLAVOUR:TAG
        image: Reference,
    },
    /// Find the commit that a fault came with, by trying versions in fresh desktops of the running daemon
    Bisect(Search),
    /// Make an earlier commit's content the next version of its flavour
    Revert {
        /// The commit to go back to
        image: Reference,
        /// Why
        #[arg(short, long, value_name = "TEXT")]
        message: Option<String>,
    },
    /// Remove a flavour with all its tags; `gc` then deletes what nothing needs
    Rm {
        /// Flavour
        flavour: FlavourName,
    },
    /// Write the tree of a commit as a directory
    Checkout {
        /// FLAVOUR, FLAVOUR:TAG or FLAVOUR@ID
        image: Reference,
        /// Directory, which must not be there yet
        #[arg(value_hint = ValueHint::DirPath)]
        to: PathBuf,
    },
    /// Write the tree of a commit as a directory, a tar or an OCI archive
    Export {
        /// FLAVOUR, FLAVOUR:TAG or FLAVOUR@ID
        image: Reference,
        /// What is written: by its name a .tar, .tar.gz, .tar.zst, .oci, or else a directory
        #[arg(value_hint = ValueHint::AnyPath)]
        to: PathBuf,
        /// What it is, whatever its name
        #[arg(long)]
        format: Option<ExportFormat>,
    },
    /// Make a pair of keys: FILE, to be kept secret, and FILE.pub
    Key {
        /// File of the secret key
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Sign a commit
    Sign {
        /// FLAVOUR, FLAVOUR:TAG or FLAVOUR@ID
        image: Reference,
        /// Secret key of minisign
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: PathBuf,
        /// Read the key's password from the first line of standard input
        #[arg(long)]
        password_stdin: bool,
    },
    /// Show or set whose commits may be used
    Policy {
        /// Public key of minisign: only commits signed by such a key may be used
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        require: Vec<PathBuf>,
        /// Let all commits be used
        #[arg(long, conflicts_with = "require")]
        none: bool,
    },
    /// Read everything and compare it with its digest
    Fsck {
        /// Repository to take from what is damaged or missing here
        #[arg(long, value_name = "REMOTE")]
        repair: Option<PathBuf>,
        #[command(flatten)]
        access: Access,
    },
    /// Delete what no tag, no recent past of a tag and no desktop needs
    Gc {
        /// Only say what would be deleted
        #[arg(long)]
        dry_run: bool,
        /// Days for which a tag's past is kept
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        keep_days: u32,
    },
    /// Bring a flavour to another repository
    Push(Transfer),
    /// Get a flavour from another repository
    Pull(Transfer),
    /// Get every flavour of another repository
    Clone {
        /// The other repository: a directory, https://USER@HOST[:PORT], or s3://BUCKET[/PREFIX]
        remote: PathBuf,
        #[command(flatten)]
        access: Access,
    },
}

/// How desktops that follow a tag get what it is put on. Without any of these
/// all get it at their next start.
#[derive(Debug, Args)]
pub(crate) struct Steps {
    /// How many of a hundred desktops get it first; the others keep what they have
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) canary: Option<u8>,
    /// Seconds after which users of the older one are asked to leave it
    #[arg(long, value_name = "SECONDS")]
    pub(crate) soft: Option<u64>,
    /// Seconds after which desktops of the older one are stopped
    #[arg(long, value_name = "SECONDS")]
    pub(crate) hard: Option<u64>,
}

impl Steps {
    /// What they come to, if there are any.
    pub(crate) fn rollout(&self) -> Option<Rollout> {
        let none = self.canary.is_none() && self.soft.is_none() && self.hard.is_none();
        let rollout =
            Rollout { canary_percent: self.canary.unwrap_or(100), soft_after_s: self.soft, hard_after_s: self.hard };
        (!none).then_some(rollout)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Import {
    /// Directory, archive or disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) source: PathBuf,
    /// Flavour that it is the next version of
    #[arg(long)]
    pub(crate) flavour: FlavourName,
    /// What it is, or why it was made
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: String,
    /// Who made it, unless it is whoever runs this
    #[arg(long)]
    pub(crate) author: Option<String>,
    /// Recipe that says how it runs; without one it runs as the flavour's head does
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) recipe: Option<PathBuf>,
    /// It is the plain content of a disk, which no name ending in .raw or .img says
    #[arg(long)]
    pub(crate) disk: bool,
    /// Most that an archive or a disk may hold
    #[arg(long, value_name = "SIZE", default_value = "64G")]
    pub(crate) max_size: Bytes,
    /// Let desktops follow it at once: move the tag `default` too
    #[arg(long)]
    pub(crate) publish: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ExportFormat {
    Dir,
    Tar,
    TarGz,
    TarZst,
    Oci,
}

impl From<ExportFormat> for qvd_gateway::images::ExportFormat {
    fn from(format: ExportFormat) -> Self {
        match format {
            ExportFormat::Dir => Self::Dir,
            ExportFormat::Tar => Self::Tar,
            ExportFormat::TarGz => Self::TarGz,
            ExportFormat::TarZst => Self::TarZst,
            ExportFormat::Oci => Self::Oci,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Transfer {
    /// The other repository: a directory, https://USER@HOST[:PORT], or s3://BUCKET[/PREFIX]
    pub(crate) remote: PathBuf,
    /// FLAVOUR with all its tags, or FLAVOUR:TAG
    pub(crate) image: Reference,
    /// Let `head` leave commits that the other side does not have
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) access: Access,
}

/// How another repository is reached.
#[derive(Debug, Args)]
pub(crate) struct Access {
    /// Certificate to trust, in PEM, instead of those that the host trusts
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ca: Option<PathBuf>,
    /// Read the password at the other server from the first line of standard input
    #[arg(long)]
    pub(crate) password_stdin: bool,
}
