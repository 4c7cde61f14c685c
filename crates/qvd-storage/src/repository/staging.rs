//! Adding to a repository: nothing shows before it is whole and on disk.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
};

use super::{Commit, CommitId, ObjectHasher, ObjectId, Repository, Tree, TreeId, erofs, lock::Lock, verity};
use crate::{Error, fsio};

/// Contents up to this length are hashed before anything is written, so that
/// what is there already costs no write.
const IN_MEMORY_BYTES: usize = 1 << 20;
/// How many more large files may turn out to be new than to be there before none is
/// read beforehand.
const GUESSES: i32 = 4;
/// Largest file that is.
const READ_TWICE_MAX_BYTES: u64 = 1 << 30;
/// Above this many files one sync of the file system is cheaper than one each.
const SYNC_EACH_MAX: usize = 48;
/// Who may read what a repository holds is decided at its top directory.
const MODE: u32 = 0o444;

/// What is being added to a repository. Garbage collection waits for it.
///
/// Contents and trees go to a directory of its own first, and get their names
/// in [`Staging::settle`] after they are on disk: whatever has its name is
/// whole, also after a power cut. Calls may come from several threads.
#[derive(Debug)]
pub struct Staging<'r> {
    repository: &'r Repository,
    dir: tempfile::TempDir,
    next: AtomicU64,
    waiting: Mutex<Waiting>,
    /// How many files more may be read twice: see [`Staging::put_file`].
    guesses: AtomicI32,
    _lock: Lock,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Name that it gets, and where it is now.
    files: HashMap<PathBuf, PathBuf>,
    bytes: u64,
}

/// What a content is known by once it is added; none when it is empty.
pub type Added = (Option<ObjectId>, u64);

impl<'r> Staging<'r> {
    pub(crate) fn new(repository: &'r Repository) -> Result<Self, Error> {
        let lock = Lock::shared(&repository.lock_path())?;
        let incoming = repository.incoming();
        let dir = tempfile::Builder::new().prefix("add-").tempdir_in(&incoming);
        Ok(Self {
            repository,
            dir: dir.map_err(Error::io("make a directory in", &incoming))?,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
            guesses: AtomicI32::new(GUESSES),
            _lock: lock,
        })
    }

    /// The repository that is added to.
    #[must_use]
    pub const fn repository(&self) -> &'r Repository {
        self.repository
    }

    /// Adds a content, read to its end.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub fn put(&self, from: &mut dyn Read) -> io::Result<Added> {
        let mut start = Vec::new();
        from.take(IN_MEMORY_BYTES as u64 + 1).read_to_end(&mut start)?;
        if start.len() <= IN_MEMORY_BYTES {
            return self.put_bytes(&start);
        }
        let (path, mut file) = self.file()?;
        let (id, len) = verity::copy(&mut start.as_slice().chain(from), |bytes| file.write_all(bytes))?;
        self.stage(path, self.repository.objects.path(id), len)?;
        Ok((Some(id), len))
    }

    /// As [`Staging::put`], of a file. One that is too large for memory is first only
    /// read: after a small change it is there already, and need not be written. Where
    /// that turns out to be wrong too often, it is not tried any more.
    pub(crate) fn put_file(&self, file: &mut File) -> io::Result<Added> {
        let bytes = file.metadata()?.len();
        let fits = (IN_MEMORY_BYTES as u64 + 1..=READ_TWICE_MAX_BYTES).contains(&bytes);
        if fits && self.guesses.load(Ordering::Relaxed) > 0 {
            let (id, len) = verity::copy(&mut Read::take(&mut *file, bytes), |_| Ok(()))?;
            if self.has(id) {
                self.guesses.fetch_add(1, Ordering::Relaxed);
                return Ok((Some(id), len));
            }
            self.guesses.fetch_sub(1, Ordering::Relaxed);
            file.rewind()?;
        }
        // Somebody may make it longer all the time.
        self.put(&mut Read::take(file, bytes))
    }

    /// Adds a content.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put_bytes(&self, content: &[u8]) -> io::Result<Added> {
        if content.is_empty() {
            return Ok((None, 0));
        }
        let mut hasher = ObjectHasher::new();
        hasher.update(content);
        let id = hasher.finish();
        self.add(self.repository.objects.path(id), content)?;
        Ok((Some(id), content.len() as u64))
    }

    /// Adds a tree whose contents are there, and what it is mounted from.
    ///
    /// # Errors
    /// One of its contents is missing, or it cannot be written.
    pub fn tree(&self, tree: &Tree) -> Result<TreeId, Error> {
        let (id, bytes) = tree.encode();
        if self.repository.has_tree(id) {
            return Ok(id);
        }
        if let Some((missing, _)) = tree.objects().find(|(object, _)| !self.has(*object)) {
            let reason = format!("its object {missing} is missing");
            return Err(Error::DamagedPart { what: format!("tree {id}"), reason });
        }
        let write = || {
            self.add(self.repository.mountable_path(id), &erofs::image(tree))?;
            self.add(self.repository.tree_path(id), &bytes)
        };
        write().map_err(Error::io("write a tree in", self.dir.path()))?;
        Ok(id)
    }

    /// Adds a commit, after everything that was added before it.
    ///
    /// # Errors
    /// Its content or a parent is not there, or it cannot be written.
    pub fn commit(&self, commit: &Commit) -> Result<CommitId, Error> {
        self.settle()?;
        let (id, bytes) = commit.encode().map_err(|e| Error::io("encode", "commit")(io::Error::from(e)))?;
        let incomplete = |reason: String| Error::DamagedPart { what: format!("commit {id}"), reason };
        if let Some(parent) = commit.parents.iter().find(|parent| !self.repository.has_commit(**parent)) {
            return Err(incomplete(format!("its parent {parent} is missing")));
        }
        self.repository.expect_content(commit).map_err(incomplete)?;
        self.add_commit(id, commit, &bytes)?;
        self.settle()?;
        Ok(id)
    }

    /// Adds a commit that was looked at, and the list of what is new in it.
    pub(crate) fn add_commit(&self, id: CommitId, commit: &Commit, bytes: &[u8]) -> Result<(), Error> {
        let novel = self.repository.encode_novel(id, commit)?;
        let add = || {
            self.add(self.repository.novel_path(id), &novel)?;
            self.add(self.repository.commit_path(id), bytes)
        };
        add().map_err(Error::io("write", self.dir.path()))
    }

    /// Whether a content is there or was added.
    #[must_use]
    pub fn has(&self, id: ObjectId) -> bool {
        self.waiting().files.contains_key(&self.repository.objects.path(id)) || self.repository.objects.has(id)
    }

    /// Gives everything that was added so far its name, once it is on disk.
    ///
    /// # Errors
    /// It cannot be written to disk or renamed.
    pub fn settle(&self) -> Result<(), Error> {
        let mut waiting = self.waiting();
        if waiting.files.is_empty() {
            return Ok(());
        }
        let settle = || {
            let each = waiting.files.len() <= SYNC_EACH_MAX;
            if each {
                waiting.files.values().try_for_each(|path| File::open(path)?.sync_all())?;
            } else {
                rustix::fs::syncfs(fsio::open_dir(self.dir.path())?)?;
            }
            // What is needed has its name for good before what needs it.
            let mut files: Vec<(&PathBuf, &PathBuf)> = waiting.files.iter().collect();
            files.sort_unstable_by_key(|(to, _)| (self.rank(to), *to));
            for group in files.chunk_by(|(one, _), (other, _)| self.rank(one) == self.rank(other)) {
                let mut dirs: Vec<&Path> = Vec::new();
                for (to, from) in group {
                    let Some(parent) = to.parent() else { continue };
                    // Of the objects: the others are there from the start.
                    if let Err(error) = fs::create_dir(parent)
                        && error.kind() != io::ErrorKind::AlreadyExists
                    {
                        return Err(error);
                    }
                    fs::rename(from, to)?;
                    dirs.push(parent);
                }
                if group.len() > SYNC_EACH_MAX {
                    rustix::fs::syncfs(fsio::open_dir(self.dir.path())?)?;
                    continue;
                }
                dirs.extend(dirs.clone().iter().filter_map(|dir| dir.parent()));
                dirs.sort_unstable();
                dirs.dedup();
                dirs.iter().try_for_each(|dir| fsio::sync_dir(dir))?;
            }
            Ok(())
        };
        settle().map_err(Error::io("write below", self.repository.dir()))?;
        *waiting = Waiting::default();
        Ok(())
    }

    /// When in the order of names one is given: contents, what trees are mounted
    /// from, trees, lists of what is new, commits.
    fn rank(&self, to: &Path) -> u8 {
        let derived = to.extension().is_some();
        match to.parent().and_then(Path::file_name) {
            Some(dir) if dir == "trees" => 2 - u8::from(derived),
            Some(dir) if dir == "commits" => 4 - u8::from(derived),
            _ => 0,
        }
    }

    /// Adds a file under the name that it is to have, unless it is there.
    pub(crate) fn add(&self, to: PathBuf, content: &[u8]) -> io::Result<()> {
        if to.exists() || self.waiting().files.contains_key(&to) {
            return Ok(());
        }
        let (path, mut file) = self.file()?;
        file.write_all(content)?;
        self.stage(path, to, content.len() as u64)
    }

    /// A file of its own to write to, and its path.
    pub(crate) fn file(&self) -> io::Result<(PathBuf, File)> {
        let path = self.dir.path().join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(MODE).open(&path)?;
        Ok((path, file))
    }

    /// Lets a file that was written get its name at the next settling.
    pub(crate) fn stage(&self, from: PathBuf, to: PathBuf, len: u64) -> io::Result<()> {
        if to.exists() {
            return fs::remove_file(from);
        }
        let mut waiting = self.waiting();
        waiting.bytes += len;
        match waiting.files.insert(to, from) {
            Some(other) => fs::remove_file(other),
            None => Ok(()),
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
