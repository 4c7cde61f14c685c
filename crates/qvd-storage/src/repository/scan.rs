//! From a directory to a tree: what is there, without following anything out.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CString, OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, mpsc},
    thread,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, major, minor, openat, readlinkat, statat},
    io::Errno,
};

use super::{
    Entry, Meta, Node, Staging, TREE_MAX_ENTRIES, Tree,
    archive::bad,
    capture::{Look, Past},
    encoding,
    staging::Added,
};
use crate::{Error, fsio, trash, xattr::xattrs};

/// Most threads that read and hash.
const THREADS_MAX: usize = 4;
/// Files that are open and wait to be read.
const OPEN_MAX: usize = 64;

impl Staging<'_> {
    /// Adds every content in a directory and returns its tree. `omit` says what
    /// is left out, by its path in the tree; of a directory that is left out
    /// nothing is looked at.
    ///
    /// The directory may belong to somebody hostile who changes it meanwhile:
    /// nothing outside of it is read, whatever links are put in its way.
    ///
    /// # Errors
    /// Something in it cannot be read, or cannot be in a tree.
    pub fn scan(&self, dir: &Path, omit: &dyn Fn(&Path) -> bool) -> Result<Tree, Error> {
        self.scan_up_to(dir, omit, u64::MAX)
    }

    /// As [`Staging::scan`]; files of more than `max_bytes` altogether are refused. A
    /// sparse one has as many as it says.
    pub(crate) fn scan_up_to(&self, dir: &Path, omit: &dyn Fn(&Path) -> bool, max_bytes: u64) -> Result<Tree, Error> {
        let top = fsio::open_dir(dir).map_err(Error::io("open", dir))?;
        Ok(Tree::new(self.scan_with((dir, top.as_fd()), omit, None, max_bytes)?)?)
    }

    /// As [`Staging::scan_up_to`], of a root that a desktop has been writing to, which
    /// `what` names in errors; what has not changed does not count.
    pub(crate) fn scan_live(
        &self,
        what: &Path,
        top: BorrowedFd<'_>,
        past: &Past<'_>,
        max_bytes: u64,
    ) -> Result<Vec<Entry>, Error> {
        self.scan_with((what, top), &|_| false, Some(past), max_bytes)
    }

    fn scan_with(
        &self,
        (what, top): (&Path, BorrowedFd<'_>),
        omit: &dyn Fn(&Path) -> bool,
        past: Option<&Past<'_>>,
        max_bytes: u64,
    ) -> Result<Vec<Entry>, Error> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let (send, receive) = mpsc::sync_channel::<(usize, File)>(OPEN_MAX);
        let receive = Mutex::new(receive);
        let results: Mutex<Vec<(usize, io::Result<Added>)>> = Mutex::default();
        let work = || {
            loop {
                let next = receive.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok((number, mut file)) = next else { break };
                let added = self.put_file(&mut file);
                results.lock().unwrap_or_else(PoisonError::into_inner).push((number, added));
            }
        };
        let (entries, linked, at) = (Vec::new(), HashMap::new(), PathBuf::new());
        let mut walk = Walk { top, omit, past, entries, linked, at, max_bytes, bytes: 0 };
        let walked = thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
            // The threads end when the sender is gone.
            let send = send;
            walk.all(&send)
        });
        walked.map_err(Error::io("read", what.join(&walk.at)))?;
        let mut entries = walk.entries;
        for (number, added) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let Some(entry) = entries.get_mut(number) else { continue };
            let (content, len) = added.map_err(Error::io("read", what.join(&entry.path)))?;
            if let Node::File { object, size_bytes, .. } = &mut entry.node {
                (*object, *size_bytes) = (content, len);
            }
        }
        // Other names of the same file were seen before it was read.
        let firsts: HashMap<u32, Node> = walk
            .linked
            .values()
            .filter_map(|(number, link)| Some((*link, entries.get(*number)?.node.clone())))
            .collect();
        for entry in entries.iter_mut().filter(|entry| entry.link() > 0) {
            if let Some(node) = firsts.get(&entry.link()) {
                entry.node = node.clone();
            }
        }
        Ok(entries)
    }
}

struct Walk<'a> {
    top: BorrowedFd<'a>,
    omit: &'a dyn Fn(&Path) -> bool,
    past: Option<&'a Past<'a>>,
    entries: Vec<Entry>,
    /// Files with several names, by device and number: the first entry and the
    /// number of the group.
    linked: HashMap<(u64, u64), (usize, u32)>,
    /// Where it is, for errors.
    at: PathBuf,
    /// How many bytes may be read, and how many are to be.
    max_bytes: u64,
    bytes: u64,
}

impl Walk<'_> {
    fn all(&mut self, send: &mpsc::SyncSender<(usize, File)>) -> io::Result<()> {
        let root = self.meta(&fstat(self.top)?, &fd_path(self.top, OsStr::new("")))?;
        self.entries.push(Entry { path: PathBuf::new(), meta: root, node: Node::Directory });
        let mut todo = vec![PathBuf::new()];
        while let Some(path) = todo.pop() {
            self.at.clone_from(&path);
            let dir: OwnedFd = match path.as_os_str().is_empty() {
                true => fsio::open_dir_below(self.top, ".")?,
                false => fsio::open_dir_below(self.top, &path)?,
            };
            for (name, _) in trash::list(&dir)? {
                let path = path.join(OsStr::from_bytes(name.as_bytes()));
                if (self.omit)(&path) {
                    continue;
                }
                if self.entries.len() > TREE_MAX_ENTRIES {
                    return Err(io::Error::other(format!("more than {TREE_MAX_ENTRIES} files are in it")));
                }
                self.at.clone_from(&path);
                match self.one(dir.as_fd(), &name, path, send) {
                    Ok(Some(below)) => todo.push(below),
                    Ok(None) => {}
                    // It went away since the directory was listed.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Adds an entry; returns its path if it is a directory to be walked.
    fn one(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CString,
        path: PathBuf,
        send: &mpsc::SyncSender<(usize, File)>,
    ) -> io::Result<Option<PathBuf>> {
        let mut stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match self.past.map_or(Ok(Look::Read), |past| past.look(dir, name, &path, &stat))? {
            Look::Read => {}
            Look::Same(entry) => {
                self.entries.push(entry);
                return Ok(None);
            }
            Look::LeaveOut => return Ok((FileType::from_raw_mode(stat.st_mode).is_dir()).then_some(path)),
            Look::Elsewhere => return Ok(None),
        }
        let at = fd_path(dir, OsStr::from_bytes(name.as_bytes()));
        let node = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Node::Directory,
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(openat(dir, name, flags, Mode::empty())?);
                stat = fstat(&file)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Errno::NOENT.into());
                }
                let (known, link) = self.link(&stat);
                if !known {
                    self.bytes = self.bytes.saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
                }
                if self.bytes > self.max_bytes {
                    return Err(bad(format!("with it there are more than {} bytes", self.max_bytes)));
                }
                if !known && send.send((self.entries.len(), file)).is_err() {
                    return Err(io::Error::other("the threads that read have ended"));
                }
                Node::File { object: None, size_bytes: 0, link }
            }
            FileType::Symlink => {
                Node::Symlink(OsString::from_vec(readlinkat(dir, name, Vec::new())?.into_bytes()).into())
            }
            FileType::Fifo => Node::Fifo,
            FileType::Socket => Node::Socket,
            FileType::CharacterDevice => Node::CharDevice(major(stat.st_rdev), minor(stat.st_rdev)),
            FileType::BlockDevice => Node::BlockDevice(major(stat.st_rdev), minor(stat.st_rdev)),
            FileType::Unknown => return Err(io::Error::other("it is of an unknown kind")),
        };
        let below = matches!(node, Node::Directory).then(|| path.clone());
        let meta = self.meta(&stat, &at)?;
        self.entries.push(Entry { path, meta, node });
        Ok(below)
    }

    fn meta(&self, stat: &Stat, at: &Path) -> io::Result<Meta> {
        let meta = meta(stat, at)?;
        Ok(match self.past {
            Some(past) => past.inside(meta),
            None => meta,
        })
    }

    /// Whether another name of the file was seen, and the number of its group.
    fn link(&mut self, stat: &Stat) -> (bool, u32) {
        if stat.st_nlink < 2 {
            return (false, 0);
        }
        let next = u32::try_from(self.linked.len()).unwrap_or(u32::MAX).saturating_add(1);
        let number = self.entries.len();
        match self.linked.entry((stat.st_dev, stat.st_ino)) {
            std::collections::hash_map::Entry::Occupied(known) => (true, known.get().1),
            std::collections::hash_map::Entry::Vacant(new) => (false, new.insert((number, next)).1),
        }
    }
}

fn fd_path(dir: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name)
}

fn meta(stat: &Stat, at: &Path) -> io::Result<Meta> {
    let mut kept = BTreeMap::new();
    for (name, value) in xattrs(at)? {
        // What overlayfs keeps for itself, and what no tree can have, stay behind.
        if !name.starts_with(b"trusted.overlay.") && encoding::xattr_prefix(&name).is_some() {
            kept.insert(name, value);
        }
    }
    Ok(Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_unix_s: stat.st_mtime,
        xattrs: kept,
    })
}
