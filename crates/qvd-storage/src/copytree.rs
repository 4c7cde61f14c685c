//! A faithful copy of a tree, whatever is in it and however deep it is.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat,
        copy_file_range, fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, ioctl_ficlone, lgetxattr,
        linkat, llistxattr, lsetxattr, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};

use crate::{Error, fsio, trash};

/// How the content of files gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Read and written: shares nothing with the source.
    Copied,
    /// The file system shares it until one of the two is written (`FICLONE`);
    /// where it cannot, that is an error.
    Shared,
    /// Shared where the file system can, otherwise copied by the kernel.
    Cheapest,
}

/// Copies what is in the directory `from`, and its own mode, owner, attributes
/// and times, to the directory `to`: files with their holes, links, fifos,
/// sockets and nodes, with modes, owners, extended attributes (so ACLs and
/// capabilities), hard links and times. `what` names the source in errors.
///
/// Nobody else may change either tree meanwhile. Two directories are open at a
/// time, however deep the trees are.
///
/// # Errors
/// The first that could not be copied. What was copied so far stays.
pub(crate) fn copy_tree(what: &Path, from: BorrowedFd<'_>, to: BorrowedFd<'_>, content: Content) -> Result<(), Error> {
    let links = Links { tops: (from, to), stage: None, seen: HashMap::new() };
    let mut copier = Copier { content, links, names: Vec::new(), entry: None };
    copier.tree(from, to).map_err(|error| Error::io("copy", copier.place(what))(error))
}

/// A directory that is being copied.
struct Frame {
    stat: Stat,
    entries: std::vec::IntoIter<(CString, FileType)>,
}

struct Copier<'a> {
    content: Content,
    links: Links<'a>,
    /// Where in the tree it is: for errors alone.
    names: Vec<CString>,
    entry: Option<CString>,
}

const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Copier<'_> {
    fn place(&self, what: &Path) -> PathBuf {
        let names = self.names.iter().chain(&self.entry);
        names.fold(what.to_path_buf(), |path, name| path.join(OsStr::from_bytes(name.to_bytes())))
    }

    fn tree(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
        // Opened anew: the caller's may be at another position, or a path only.
        let mut source = openat(from, ".", DIR, Mode::empty())?;
        let mut target = openat(to, ".", DIR, Mode::empty())?;
        let mut above: Vec<Frame> = Vec::new();
        let mut frame = Frame::of(&source)?;
        loop {
            let Some((name, kind)) = frame.entries.next() else {
                self.entry = None;
                if above.is_empty() {
                    self.links.close()?;
                }
                finish(&target, &source, &frame.stat)?;
                let Some(parent) = above.pop() else { return Ok(()) };
                // Up by name instead of by a descriptor for every level. Both
                // trees are still; that it leads back is checked all the same.
                (source, target) =
                    (openat(&source, "..", DIR, Mode::empty())?, openat(&target, "..", DIR, Mode::empty())?);
                let now = fstat(&source)?;
                if (now.st_dev, now.st_ino) != (parent.stat.st_dev, parent.stat.st_ino) {
                    return Err(io::Error::other("the directory was moved while it was copied"));
                }
                self.names.pop();
                frame = parent;
                continue;
            };
            self.entry = Some(name.clone());
            if kind == FileType::Directory {
                let inner = openat(&source, &name, DIR, Mode::empty())?;
                mkdirat(&target, &name, Mode::RWXU)?;
                target = openat(&target, &name, DIR, Mode::empty())?;
                source = inner;
                above.push(std::mem::replace(&mut frame, Frame::of(&source)?));
                self.names.extend(self.entry.take());
            } else {
                self.entry(source.as_fd(), target.as_fd(), &name, kind)?;
            }
        }
    }

    /// Copies what is no directory.
    fn entry(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, name: &CStr, kind: FileType) -> io::Result<()> {
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_nlink > 1 && self.links.link(&stat, target, name)? {
            return Ok(());
        }
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let from = File::from(openat(source, name, OFlags::RDONLY | flags, Mode::empty())?);
                let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags;
                let to = File::from(openat(target, name, create, Mode::RUSR | Mode::WUSR)?);
                self.content.fill(&from, &to, u64::try_from(stat.st_size).unwrap_or(0))?;
                finish(&to, &from, &stat)?;
            }
            FileType::Symlink => symlinkat(&readlinkat(source, name, Vec::new())?, target, name)?,
            kind => mknodat(target, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)?,
        }
        if kind != FileType::RegularFile {
            let (uid, gid) = owner(&stat);
            chownat(target, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            if kind != FileType::Symlink {
                rustix::fs::chmodat(target, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
            }
            copy_xattrs(At::Name(target, name), At::Name(source, name))?;
            utimensat(target, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if stat.st_nlink > 1 {
            self.links.remember(&stat, target, name)?;
        }
        Ok(())
    }
}

impl Frame {
    fn of(dir: &OwnedFd) -> io::Result<Self> {
        Ok(Self { stat: fstat(dir)?, entries: trash::list(dir)?.into_iter() })
    }
}

impl Content {
    /// Gives the empty file `to` the first `size` bytes of `from`, with their holes.
    pub(crate) fn fill(self, from: &File, to: &File, size: u64) -> io::Result<()> {
        if size == 0 {
            return Ok(());
        }
        if self != Self::Copied {
            match ioctl_ficlone(to, from) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV) if self == Self::Cheapest => {}
                Err(error) => return Err(error.into()),
            }
        }
        to.set_len(size)?;
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < size {
            let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
                // Nothing but a hole up to the end.
                Err(Errno::NXIO) => return Ok(()),
                data => data?,
            };
            let end = rustix::fs::seek(from, SeekFrom::Hole(data))?;
            if self == Self::Copied {
                buffer.resize(1 << 20, 0);
                write_range(from, to, data..end, &mut buffer)?;
            } else {
                send_range(from, to, data..end, &mut buffer)?;
            }
            at = end;
        }
        Ok(())
    }
}

fn write_range(from: &File, to: &File, range: std::ops::Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += want as u64;
    }
    Ok(())
}

fn send_range(from: &File, to: &File, range: std::ops::Range<u64>, buffer: &mut Vec<u8>) -> io::Result<()> {
    let (mut at, mut out) = (range.start, range.start);
    while at < range.end {
        let want = usize::try_from(range.end - at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut at), to, Some(&mut out), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                buffer.resize(1 << 20, 0);
                return write_range(from, to, at..range.end, buffer);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Gives an open copy what its source has beside content. The order matters:
/// a change of owner takes set-user-id bits and capabilities away.
fn finish(target: impl AsFd, source: impl AsFd, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    fchown(&target, Some(uid), Some(gid))?;
    fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    copy_xattrs(At::Open(target.as_fd()), At::Open(source.as_fd()))?;
    Ok(futimens(target, &times(stat))?)
}

fn owner(stat: &Stat) -> (Uid, Gid) {
    (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))
}

fn times(stat: &Stat) -> Timestamps {
    // The kernel gives nanoseconds below a thousand million.
    let time = |tv_sec, nsec: u64| Timespec { tv_sec, tv_nsec: i64::try_from(nsec).unwrap_or(0) };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Whose extended attributes: of what is open, or of a name, not followed.
#[derive(Clone, Copy)]
enum At<'a> {
    Open(BorrowedFd<'a>),
    Name(BorrowedFd<'a>, &'a CStr),
}

impl At<'_> {
    /// There are no such calls with a directory and a name.
    fn path(dir: BorrowedFd<'_>, name: &CStr) -> PathBuf {
        Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(OsStr::from_bytes(name.to_bytes()))
    }

    fn list(self, names: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Open(fd) => flistxattr(fd, names),
            Self::Name(dir, name) => llistxattr(Self::path(dir, name), names),
        }
    }

    fn get(self, key: &[u8], value: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Open(fd) => fgetxattr(fd, key, value),
            Self::Name(dir, name) => lgetxattr(Self::path(dir, name), key, value),
        }
    }

    fn set(self, key: &[u8], value: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fsetxattr(fd, key, value, XattrFlags::empty()),
            Self::Name(dir, name) => lsetxattr(Self::path(dir, name), key, value, XattrFlags::empty()),
        }
    }
}

/// Copies every extended attribute, ACLs and capabilities among them.
fn copy_xattrs(target: At<'_>, source: At<'_>) -> io::Result<()> {
    // Source: Linux `include/uapi/linux/limits.h`, XATTR_LIST_MAX and
    // XATTR_SIZE_MAX are both 65536.
    const MAX: usize = 65536;
    let mut names = vec![0; MAX];
    match source.list(&mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(()),
        len => names.truncate(len?),
    }
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; MAX];
        let len = source.get(name, &mut value)?;
        target.set(name, value.get(..len).unwrap_or_default())?;
    }
    Ok(())
}

/// Files with more than one name. The first copy of each also gets a name in a
/// directory at the top of the target, from where the others are linked: so
/// neither descriptors nor the length of paths limit how many there are.
struct Links<'a> {
    /// The source and the target themselves.
    tops: (BorrowedFd<'a>, BorrowedFd<'a>),
    stage: Option<Stage>,
    seen: HashMap<(u64, u64), String>,
}

struct Stage {
    top: OwnedFd,
    name: String,
    dir: OwnedFd,
}

impl Links<'_> {
    /// Links `name` to the copy of the same file, if there is one.
    fn link(&self, stat: &Stat, target: BorrowedFd<'_>, name: &CStr) -> io::Result<bool> {
        let (Some(first), Some(stage)) = (self.seen.get(&(stat.st_dev, stat.st_ino)), &self.stage) else {
            return Ok(false);
        };
        linkat(&stage.dir, first, target, name, AtFlags::empty())?;
        Ok(true)
    }

    fn remember(&mut self, stat: &Stat, target: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let stage = match &mut self.stage {
            Some(stage) => stage,
            none => none.insert(Stage::make(self.tops.0, self.tops.1)?),
        };
        let number = self.seen.len().to_string();
        linkat(target, name, &stage.dir, &number, AtFlags::empty())?;
        self.seen.insert((stat.st_dev, stat.st_ino), number);
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        let Some(stage) = self.stage.take() else { return Ok(()) };
        for (name, _) in trash::list(&stage.dir)? {
            unlinkat(&stage.dir, &name, AtFlags::empty())?;
        }
        Ok(unlinkat(&stage.top, &stage.name, AtFlags::REMOVEDIR)?)
    }
}

impl Stage {
    fn make(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<Self> {
        let top = openat(target, ".", DIR, Mode::empty())?;
        for number in 0.. {
            let name = format!(".qvd-links-{number}");
            // A name that the tree itself has, now or later, is passed over.
            if statat(source, &name, AtFlags::SYMLINK_NOFOLLOW).err() != Some(Errno::NOENT) {
                continue;
            }
            match mkdirat(&top, &name, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                made => {
                    made?;
                    let dir = fsio::open_dir_below(&top, &name)?;
                    return Ok(Self { top, name, dir });
                }
            }
        }
        Err(Errno::EXIST.into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        time::{Duration, SystemTime},
    };

    use qvd_testkit::{Need, privileged};

    use super::*;
    use crate::tree;

    fn copy(from: &Path, to: &Path, content: Content) {
        let (source, target) = (fsio::open_dir(from).unwrap(), fsio::open_dir(to).unwrap());
        copy_tree(from, source.as_fd(), target.as_fd(), content).unwrap();
    }

    fn busy_tree(at: &Path) {
        fs::create_dir_all(at.join("a/b")).unwrap();
        fs::write(at.join("a/b/f"), "content").unwrap();
        fs::hard_link(at.join("a/b/f"), at.join("a/again")).unwrap();
        fs::hard_link(at.join("a/b/f"), at.join("third")).unwrap();
        fs::create_dir(at.join(".qvd-links-0")).unwrap();
        symlink("/etc/shadow", at.join("a/link")).unwrap();
        for (name, kind) in
            [("fifo", FileType::Fifo), ("socket", FileType::Socket), ("null", FileType::CharacterDevice)]
        {
            mknodat(rustix::fs::CWD, at.join(name), kind, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
        }
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        lsetxattr(at.join("third"), "security.capability", &capability, XattrFlags::empty()).unwrap();
        lsetxattr(at.join("a/link"), "trusted.of-a-link", b"1", XattrFlags::empty()).unwrap();
        lsetxattr(at.join("a"), "user.of-a-directory", b"2", XattrFlags::empty()).unwrap();
        fs::write(at.join("setuid"), "x").unwrap();
        std::os::unix::fs::chown(at.join("setuid"), Some(65534), Some(65533)).unwrap();
        fs::set_permissions(at.join("setuid"), fs::Permissions::from_mode(0o6711)).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        File::open(at.join("a/b")).unwrap().set_modified(old).unwrap();
    }

    #[test]
    fn everything_that_counts_is_copied() {
        privileged(&[Need::Root], || {
            let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            busy_tree(from.path());
            for content in [Content::Copied, Content::Cheapest] {
                let to = to.path().join(format!("{content:?}"));
                fs::create_dir(&to).unwrap();
                copy(from.path(), &to, content);
                let (one, other) = (tree::summarize(from.path()).unwrap(), tree::summarize(&to).unwrap());
                assert_eq!(one, other);
                let ino = |name: &str| fs::symlink_metadata(to.join(name)).unwrap().ino();
                assert_eq!((ino("third"), ino("third")), (ino("a/again"), ino("a/b/f")));
                for name in ["a/b", "third", "a/link", "a", "."] {
                    let time = |at: &Path| {
                        let meta = fs::symlink_metadata(at.join(name)).unwrap();
                        (meta.mtime(), meta.mtime_nsec())
                    };
                    assert_eq!(time(from.path()), time(&to), "{name}");
                }
            }
        });
    }

    #[test]
    fn holes_stay_holes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = File::create(from.path().join("sparse")).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"island", 32 << 20).unwrap();
        for content in [Content::Copied, Content::Cheapest] {
            let to = to.path().join(format!("{content:?}"));
            fs::create_dir(&to).unwrap();
            copy(from.path(), &to, content);
            let meta = fs::metadata(to.join("sparse")).unwrap();
            assert!(meta.len() == 64 << 20 && meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
            let mut island = [0; 6];
            File::open(to.join("sparse")).unwrap().read_exact_at(&mut island, 32 << 20).unwrap();
            assert_eq!(&island, b"island");
        }
    }

    #[test]
    fn a_deep_tree_needs_no_more_descriptors_than_a_flat_one() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut at = fsio::open_dir(from.path()).unwrap();
        for _ in 0..300 {
            mkdirat(&at, "directory", Mode::RWXU).unwrap();
            at = fsio::open_dir_below(&at, "directory").unwrap();
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        drop(openat(&at, "bottom", flags, Mode::RUSR).unwrap());
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let few = rustix::process::Rlimit { current: Some(64), ..limit };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
        copy(from.path(), to.path(), Content::Cheapest);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let mut at = fsio::open_dir(to.path()).unwrap();
        for _ in 0..300 {
            at = fsio::open_dir_below(&at, "directory").unwrap();
        }
        statat(&at, "bottom", AtFlags::empty()).unwrap();
    }

    #[test]
    fn what_could_not_be_copied_is_named() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/f"), "x").unwrap();
        fs::create_dir_all(to.path().join("a")).unwrap();
        let (source, target) = (fsio::open_dir(from.path()).unwrap(), fsio::open_dir(to.path()).unwrap());
        let error = copy_tree(from.path(), source.as_fd(), target.as_fd(), Content::Copied).unwrap_err();
        assert!(error.to_string().contains(from.path().join("a").to_str().unwrap()), "{error}");
    }
}
