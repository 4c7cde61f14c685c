//! Deletion that does not keep anybody waiting: a rename now, the work later.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, RenameFlags, renameat_with, unlinkat},
    io::Errno,
};

use crate::{Error, backend::delete_subvolume_at, fsio, lvm::Volume};

/// A directory of things to be deleted, and the thread that deletes them.
/// What a crash leaves in it is deleted after the next open.
#[derive(Debug)]
pub(crate) struct Trash {
    path: PathBuf,
    shared: Arc<Shared>,
    tell: Option<mpsc::Sender<Work>>,
    worker: Option<thread::JoinHandle<()>>,
}

/// What the thread in the background is told to do.
enum Work {
    Empty,
    Other(Box<dyn FnOnce() + Send>),
}

#[derive(Debug)]
struct Shared {
    dir: OwnedFd,
    /// Whether what is in it may be subvolumes of btrfs.
    subvolumes: bool,
    stop: AtomicBool,
    next: AtomicU64,
    /// Held by who deletes: what another thread is at has no name any more and
    /// is not gone yet.
    emptying: Mutex<()>,
}

impl Trash {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        fsio::ensure_private_dir(path).map_err(Error::io("use", path))?;
        let dir = fsio::open_dir(path).map_err(Error::io("open", path))?;
        let subvolumes = qvd_sys::btrfs::is_btrfs(dir.as_fd()).map_err(Error::io("open", path))?;
        let (stop, next, emptying) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(()));
        let shared = Arc::new(Shared { dir, subvolumes, stop, next, emptying });
        let (tell, told) = mpsc::channel();
        let worker = {
            let shared = Arc::clone(&shared);
            let work = move || {
                // Woken, it would take the processor from who woke it, and keep it for a whole file.
                if let Err(error) = qvd_sys::thread::work_in_background() {
                    tracing::debug!(%error, "the trash is emptied as hurriedly as anything");
                }
                let mut work = Work::Empty;
                while !shared.stop.load(Ordering::Acquire) {
                    match work {
                        Work::Empty => {
                            if let Err(error) = shared.empty() {
                                tracing::warn!(%error, "cannot delete what is in the trash; trying again at the next removal");
                            }
                        }
                        Work::Other(work) => work(),
                    }
                    match told.recv() {
                        Ok(next) => work = next,
                        Err(_) => break,
                    }
                }
            };
            thread::Builder::new().name("trash".to_owned()).spawn(work).map_err(Error::io("delete below", path))?
        };
        Ok(Self { path: path.to_path_buf(), shared, tell: Some(tell), worker: Some(worker) })
    }

    /// Deletes everything in it, in this thread, and says whether that worked.
    pub(crate) fn empty(&self) -> Result<(), Error> {
        self.shared.empty().map_err(Error::io("empty", &self.path))
    }

    /// Takes what is at `path` out of the way; `Ok` when nothing is there.
    /// Returns once it is renamed; deleting it may take much longer.
    pub(crate) fn discard(&self, path: &Path) -> Result<(), Error> {
        self.discard_at(CWD, path).map_err(Error::io("remove", path))
    }

    /// Takes what was being made in `dir` when a process was killed: whatever
    /// has a name that begins with a dot, as no root and no home has.
    pub(crate) fn take_temporary(&self, dir: &Path) -> Result<(), Error> {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("read", dir)(error)),
        };
        for entry in entries {
            let name = entry.map_err(Error::io("read", dir))?.file_name();
            let path = dir.join(&name);
            match Volume::doom(&name) {
                Some(entry) => self.discard_as(&path, &entry)?,
                None if name.as_encoded_bytes().starts_with(b".") => self.discard(&path)?,
                None => {}
            }
        }
        Ok(())
    }

    /// As [`Trash::discard`], for a name in an open directory.
    pub(crate) fn discard_at(&self, dir: impl AsFd, name: impl rustix::path::Arg + Copy) -> io::Result<()> {
        if self.set_aside_at(dir, name)? {
            self.tell(Work::Empty);
        }
        Ok(())
    }

    /// Closes these detached mounts later: who needs them no more does not wait for
    /// the kernel to be sure that nobody looks into them (`synchronize_rcu_expedited`
    /// in Linux `fs/namespace.c`, `namespace_unlock`).
    pub(crate) fn close_later(&self, mounts: Vec<OwnedFd>) {
        self.later(move || drop(mounts));
    }

    /// Does something for which nobody waits, in the thread that deletes. It is
    /// forgotten when the trash is closed before.
    pub(crate) fn later(&self, work: impl FnOnce() + Send + 'static) {
        self.tell(Work::Other(Box::new(work)));
    }

    /// As [`Trash::discard`], with the name `entry` in the trash, which says what
    /// else belongs to it: a thin volume, which is removed before the directory.
    pub(crate) fn discard_as(&self, path: &Path, entry: &str) -> Result<(), Error> {
        match renameat_with(CWD, path, &self.shared.dir, entry, RenameFlags::NOREPLACE) {
            Ok(()) => self.tell(Work::Empty),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(Error::io("remove", path)(error)),
        }
        Ok(())
    }

    fn tell(&self, work: Work) {
        if let Some(tell) = &self.tell
            && tell.send(work).is_err()
        {
            tracing::warn!(path = %self.path.display(), "nobody empties the trash");
        }
    }

    /// As [`Trash::discard_at`], but to be deleted with what is discarded next:
    /// who has more to do in the same directories does not compete with that. Says
    /// whether anything was there.
    pub(crate) fn set_aside_at(&self, dir: impl AsFd, name: impl rustix::path::Arg + Copy) -> io::Result<bool> {
        match self.shared.take_in(dir.as_fd(), name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            done => done.map(|()| true),
        }
    }
}

impl Drop for Trash {
    fn drop(&mut self) {
        // The worker ends after the file it is at; the rest waits for the next open.
        self.shared.stop.store(true, Ordering::Release);
        self.tell = None;
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            tracing::warn!(path = %self.path.display(), "the thread that empties the trash failed");
        }
    }
}

impl Shared {
    /// Deletes everything in the trash. A directory that is not empty is first
    /// pulled up to the trash itself: so neither the stack nor the descriptors
    /// in use grow with the depth that a desktop chose for its directories.
    /// Nothing below a mount point is ever touched. One thread does it at a time:
    /// who comes second returns when the first has finished too.
    fn empty(&self) -> io::Result<()> {
        let _one_at_a_time = self.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut progress = false;
            let mut failure = None;
            for (name, _) in list(&self.dir)? {
                if self.stop.load(Ordering::Acquire) {
                    return Ok(());
                }
                match self.delete(&name) {
                    Ok(()) => progress = true,
                    Err(error) => failure = Some(error),
                }
            }
            match (progress, failure) {
                (true, _) => {}
                (false, None) => return Ok(()),
                (false, Some(error)) => return Err(error),
            }
        }
    }

    /// Deletes one entry of the trash, or what is directly in it. Another process
    /// may be at the same: what is gone meanwhile was deleted.
    fn delete(&self, name: &CString) -> io::Result<()> {
        match self.delete_some(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn delete_some(&self, name: &CString) -> io::Result<()> {
        if let Some(volume) = Volume::doomed(name.to_bytes()) {
            volume.remove().map_err(io::Error::other)?;
        }
        match unlinkat(&self.dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        match unlinkat(&self.dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        if self.subvolumes && delete_subvolume_at(self.dir.as_fd(), name).is_ok() {
            return Ok(());
        }
        let dir = fsio::open_dir_below(&self.dir, name)?;
        for (entry, kind) in list(&dir)? {
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let removed = match kind {
                FileType::Directory => unlinkat(&dir, &entry, AtFlags::REMOVEDIR),
                _ => unlinkat(&dir, &entry, AtFlags::empty()),
            };
            match removed {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) => self.take_in(dir.as_fd(), &entry)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Renames something into the trash itself, under a name of its own.
    fn take_in(&self, dir: BorrowedFd<'_>, entry: impl rustix::path::Arg + Copy) -> io::Result<()> {
        loop {
            let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
            match renameat_with(dir, entry, &self.dir, &*name, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                other => return Ok(other?),
            }
        }
    }
}

/// Names and types of what is in a directory.
pub(crate) fn list(dir: impl AsFd) -> io::Result<Vec<(CString, FileType)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                FileType::from_raw_mode(rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            known => known,
        };
        found.push((name.to_owned(), kind));
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    /// Waits until the trash is empty, as an administrator who looks would.
    fn wait_empty(trash: &Path) {
        for _ in 0..2000 {
            if fs::read_dir(trash).unwrap().next().is_none() {
                return;
            }
            thread::park_timeout(Duration::from_millis(5));
        }
        panic!("the trash was not emptied");
    }

    #[test]
    fn a_tree_goes_and_what_it_links_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, kept) = (dir.path().join("tree"), dir.path().join("kept"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("f"), "x").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("a/link")).unwrap();
        let trash = Trash::open(&dir.path().join("trash")).unwrap();
        trash.discard(&tree).unwrap();
        assert!(!tree.exists());
        wait_empty(&dir.path().join("trash"));
        assert!(kept.join("f").exists());
        trash.discard(&tree).unwrap();
    }

    #[test]
    fn a_deep_tree_does_not_exhaust_anything() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at = fsio::open_dir(&tree).unwrap();
        for _ in 0..1500 {
            rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::RWXU).unwrap();
            at = fsio::open_dir_below(&at, "d").unwrap();
        }
        drop(at);
        let trash = Trash::open(&dir.path().join("trash")).unwrap();
        trash.discard(&tree).unwrap();
        wait_empty(&dir.path().join("trash"));
    }

    #[test]
    fn what_was_discarded_is_gone_when_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trash");
        let trash = Trash::open(&path).unwrap();
        for round in 0..50 {
            let trees: Vec<_> = (0..4).map(|tree| dir.path().join(format!("{round}-{tree}"))).collect();
            thread::scope(|scope| {
                for tree in &trees {
                    scope.spawn(|| {
                        fs::create_dir_all(tree.join("a/b/c")).unwrap();
                        fs::write(tree.join("a/b/c/f"), "x").unwrap();
                        let file = fs::File::open(tree.join("a/b/c/f")).unwrap();
                        trash.discard(tree).unwrap();
                        trash.empty().unwrap();
                        assert_eq!(rustix::fs::fstat(&file).unwrap().st_nlink, 0);
                    });
                }
            });
        }
        // Somebody is still at something that has no name any more.
        let other = trash.shared.emptying.lock().unwrap();
        let (done, begun) = (AtomicBool::new(false), std::sync::Barrier::new(2));
        thread::scope(|scope| {
            scope.spawn(|| {
                begun.wait();
                trash.empty().unwrap();
                done.store(true, Ordering::Release);
            });
            begun.wait();
            for _ in 0..20 {
                thread::park_timeout(Duration::from_millis(1));
                assert!(!done.load(Ordering::Acquire), "it is said before the other has finished");
            }
            drop(other);
        });
        assert!(done.into_inner());
    }

    #[test]
    fn what_a_crash_left_is_deleted_at_open() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("trash/0/x")).unwrap();
        let _trash = Trash::open(&dir.path().join("trash")).unwrap();
        wait_empty(&dir.path().join("trash"));
    }
}
