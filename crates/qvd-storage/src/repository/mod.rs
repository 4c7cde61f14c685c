//! Images with history: contents, trees and commits by digest, tags on them.
//!
//! A repository is a directory. In it are
//!
//! - `objects`: contents of files, each once, plain, under its fs-verity digest;
//! - `trees`: lists of entries, and next to each what it is mounted from: an
//!   EROFS without contents whose files overlayfs redirects to objects;
//! - `commits`: versions of images, under the digest of their encoding;
//! - `flavours`: for each its tags, and where they have been.
//!
//! Everything but a tag is immutable and gets its name when it is whole and on
//! disk, contents before trees before commits before tags. So a reader needs no
//! lock, and after any crash what has a name is complete. Whoever adds holds
//! the lock `lock` shared; garbage collection takes it alone.
//!
//! Any number of processes may have a repository open.

pub mod archive;
mod bisect;
mod capture;
mod commit;
pub mod diff;
mod disk;
mod encoding;
mod erofs;
mod fsck;
mod gc;
mod history;
mod id;
mod lease;
mod lock;
mod novel;
mod objects;
mod packages;
mod push;
mod reference;
mod rollout;
mod rpm;
mod scan;
mod signing;
mod source;
mod staging;
mod tags;
mod told;
mod transfer;
mod tree;
mod verity;
pub mod wire;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use bisect::{Bisect, NothingBetween, Verdict};
pub use capture::{LEFT_OUT, NewVersion, Version};
pub use commit::{COMMIT_MAX_BYTES, Commit, Content};
pub use diff::{BlockDiff, Change, Diff, FileDiff, PackageDiff};
pub use disk::{DISK_BLOCK_BYTES, DISK_MAX_BYTES};
pub use fsck::{Checked, Problem};
pub use gc::{Collected, Keep};
pub use history::{Logged, NewCommit};
pub use id::{CommitId, ObjectId, TreeId};
pub use packages::{PackageKind, Packages};
pub use push::Destination;
pub use reference::{Reference, ReferenceError, Revision};
pub use rollout::{Due, Followed, Rollout};
pub use signing::{Policy, Signatures, SigningKey, VerifyingKey};
pub use source::{Directory, Source};
pub use staging::{Added, Staging};
pub use tags::{Expect, Move};
pub use told::TELL;
pub use transfer::{Transferred, Wanted};
pub use tree::{Entry, FILE_MAX_BYTES, Meta, Node, TREE_MAX_ENTRIES, Tree, TreeError};
pub use verity::ObjectHasher;

use crate::{BaseTree, Error, Layer, fsio};
use lock::Lock;
use objects::Objects;

/// Says what a directory is, and which version of it.
const FORMAT: &[u8] = b"qvd-repository-1\n";
/// Largest list of entries that is read, in bytes: of a tree as large as a tree
/// may be, with paths of usual length.
pub(crate) const TREE_MAX_BYTES: u64 = 1 << 30;

/// A repository of images.
#[derive(Debug)]
pub struct Repository {
    dir: PathBuf,
    objects: Objects,
}

impl Repository {
    /// Opens the repository in `dir`, or makes one if nothing is there.
    ///
    /// # Errors
    /// The directory is something else, or of a later version.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io("make", dir))?;
        let dir = dir.canonicalize().map_err(Error::io("open", dir))?;
        let repository = Self { objects: Objects::new(dir.join("objects")), dir };
        if repository.is_there()? {
            repository.clear_incoming()?;
        } else {
            repository.init()?;
        }
        Ok(repository)
    }

    /// Opens the repository in `dir`, which has to be one.
    ///
    /// # Errors
    /// [`Error::Io`] when nothing is there; otherwise as [`Repository::open`].
    pub fn open_existing(dir: &Path) -> Result<Self, Error> {
        fs::metadata(dir.join("format")).map_err(Error::io("find a repository in", dir))?;
        Self::open(dir)
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Begins to add to it. Waits while garbage is collected.
    ///
    /// # Errors
    /// It cannot be locked or written.
    pub fn stage(&self) -> Result<Staging<'_>, Error> {
        Staging::new(self)
    }

    /// A commit.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], or [`Error::Damaged`] when it is not what its id says.
    pub fn commit(&self, id: CommitId) -> Result<Commit, Error> {
        let bytes = self.commit_bytes(id)?;
        match Commit::decode(&bytes) {
            Ok((found, commit)) if found == id => Ok(commit),
            Ok(_) => Err(Error::Damaged { digest: id.digest(), reason: "its encoding was changed".to_owned() }),
            Err(reason) => Err(Error::Damaged { digest: id.digest(), reason }),
        }
    }

    /// A commit with all that it holds, as far as a look at names can tell.
    ///
    /// # Errors
    /// As [`Repository::commit`]; also [`Error::Damaged`] when something is missing.
    pub fn whole(&self, id: CommitId) -> Result<Commit, Error> {
        let commit = self.commit(id)?;
        self.expect_content(&commit).map_err(|reason| Error::Damaged { digest: id.digest(), reason })?;
        Ok(commit)
    }

    /// The encoding of a commit, unchecked.
    pub(crate) fn commit_bytes(&self, id: CommitId) -> Result<Vec<u8>, Error> {
        let path = self.commit_path(id);
        let bytes = match read(&path, COMMIT_MAX_BYTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoSuchImage(id.digest())),
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        Ok(bytes)
    }

    /// A tree.
    ///
    /// # Errors
    /// It is not there, or not what its id says.
    pub fn tree(&self, id: TreeId) -> Result<Tree, Error> {
        let path = self.tree_path(id);
        let damaged = |reason: String| Error::DamagedPart { what: format!("tree {id}"), reason };
        let bytes = match read(&path, TREE_MAX_BYTES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged("it is missing".to_owned())),
            bytes => bytes.map_err(Error::io("read", &path))?,
        };
        if Tree::id_of(&bytes) != id {
            return Err(damaged("its encoding was changed".to_owned()));
        }
        // Whoever added it has checked it.
        Tree::decode_checked(&bytes).map_err(|error| damaged(error.to_string()))
    }

    /// The tree of a commit.
    ///
    /// # Errors
    /// As [`Repository::tree`]; a commit of a disk has none.
    pub fn tree_of(&self, commit: &Commit) -> Result<Tree, Error> {
        match commit.content {
            Content::Tree { id, .. } => self.tree(id),
            Content::Disk { .. } => Err(Error::Refused("the commit holds a disk, not a tree".to_owned())),
        }
    }

    /// What roots on a commit stand on: its EROFS and, below, the objects.
    /// Opening it costs the same whatever the tree's size.
    ///
    /// # Errors
    /// There is no such commit, it holds a disk, its EROFS is missing, or the
    /// repository's policy refuses it.
    pub fn base(&self, id: CommitId) -> Result<BaseTree, Error> {
        let commit = self.commit(id)?;
        self.expect_trusted(id)?;
        let Content::Tree { id: tree, .. } = commit.content else {
            return Err(Error::Refused(format!("commit {id} holds a disk, not a tree")));
        };
        let mountable = self.mountable_path(tree);
        if !mountable.is_file() {
            let reason = "what it is mounted from is missing".to_owned();
            return Err(Error::Damaged { digest: id.digest(), reason });
        }
        let layers = vec![Layer::Erofs(mountable), Layer::Data(self.objects.dir().to_path_buf())];
        Ok(BaseTree::layered(id.digest(), layers))
    }

    /// Opens a content for reading.
    ///
    /// # Errors
    /// It is not there.
    pub fn object(&self, id: ObjectId) -> Result<fs::File, Error> {
        let path = self.objects.path(id);
        fs::File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::DamagedPart { what: format!("object {id}"), reason: "it is missing".to_owned() }
            }
            _ => Error::io("open", &path)(error),
        })
    }

    /// Every commit that is here, in no order.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn commits(&self) -> Result<Vec<CommitId>, Error> {
        ids(&self.dir.join("commits"), CommitId::from_hex)
    }

    /// Whether a commit is here.
    #[must_use]
    pub fn has_commit(&self, id: CommitId) -> bool {
        self.commit_path(id).exists()
    }

    /// Whether a tree and what it is mounted from are here.
    #[must_use]
    pub fn has_tree(&self, id: TreeId) -> bool {
        self.tree_path(id).exists() && self.mountable_path(id).exists()
    }

    /// Says what of a commit's content is not here.
    pub(crate) fn expect_content(&self, commit: &Commit) -> Result<(), String> {
        let object = match commit.content {
            Content::Tree { id, .. } if !self.has_tree(id) => return Err(format!("its tree {id} is missing")),
            Content::Tree { .. } => None,
            Content::Disk { blocks, .. } => Some(blocks),
        };
        let missing = object.iter().chain(&commit.packages).find(|object| !self.objects.has(**object));
        missing.map_or(Ok(()), |object| Err(format!("its object {object} is missing")))
    }

    fn is_there(&self) -> Result<bool, Error> {
        let path = self.dir.join("format");
        match fs::read(&path) {
            Ok(found) if found == FORMAT => Ok(true),
            Ok(_) => Err(Error::Refused(format!("`{}` is of a version that is unknown here", self.dir.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    fn init(&self) -> Result<(), Error> {
        // The top alone keeps others out: overlayfs reads below it as whoever
        // mounts, who may be root of an id map.
        fsio::ensure_private_dir(&self.dir).map_err(Error::io("use", &self.dir))?;
        for name in ["objects", "trees", "commits", "flavours", "incoming"] {
            let dir = self.dir.join(name);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("make", &dir)(error));
                }
                _ => {}
            }
        }
        let path = self.dir.join("format");
        fsio::replace(&path, FORMAT).map_err(Error::io("write", &path))
    }

    /// Deletes what killed processes were adding; if others are at it now,
    /// another time.
    fn clear_incoming(&self) -> Result<(), Error> {
        let incoming = self.incoming();
        let is_empty = fs::read_dir(&incoming).map_err(Error::io("read", &incoming))?.next().is_none();
        if is_empty {
            return Ok(());
        }
        let Some(_alone) = Lock::try_alone(&self.lock_path())? else { return Ok(()) };
        for entry in fs::read_dir(&incoming).map_err(Error::io("read", &incoming))? {
            let path = entry.map_err(Error::io("read", &incoming))?.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }

    pub(crate) fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    pub(crate) fn incoming(&self) -> PathBuf {
        self.dir.join("incoming")
    }

    pub(crate) fn commit_path(&self, id: CommitId) -> PathBuf {
        self.dir.join("commits").join(id.hex())
    }

    pub(crate) fn tree_path(&self, id: TreeId) -> PathBuf {
        self.dir.join("trees").join(id.hex())
    }

    pub(crate) fn mountable_path(&self, id: TreeId) -> PathBuf {
        self.dir.join("trees").join(format!("{}.erofs", id.hex()))
    }
}

/// The ids that are names in a directory.
pub(crate) fn ids<T>(dir: &Path, parse: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, Error> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_str().and_then(&parse))).collect();
    let found: io::Result<Vec<Option<T>>> = read();
    Ok(found.map_err(Error::io("read", dir))?.into_iter().flatten().collect())
}

/// Reads a file that has at most so many bytes.
fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
    }
    Ok(bytes)
}
