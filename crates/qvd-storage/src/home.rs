//! Homes: the users' files, kept apart from roots and images.

use std::{
    ffi::CString,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, DesktopId, Missing, UserName};
use qvd_sys::mount::{self, MountError, Restrictions};
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, openat, readlinkat, symlinkat},
    io::Errno,
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Image, Quota,
    backend::looped::{self, UNLIMITED, disk::Shape},
    fsio, quota, trash,
};

/// Directories nested deeper than this in a skeleton are not one's idea of a home.
const SKEL_DEPTH_MAX: usize = 32;

/// Whose home it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HomeId(String);

impl From<&UserName> for HomeId {
    fn from(user: &UserName) -> Self {
        Self(format!("user-{user}"))
    }
}

impl From<DesktopId> for HomeId {
    fn from(desktop: DesktopId) -> Self {
        Self(format!("desktop-{desktop}"))
    }
}

impl fmt::Display for HomeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the files of a home are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum HomeKind {
    /// In a directory: several desktops can use it at a time.
    #[default]
    Directory,
    /// In a file system of its own, in a sparse file: its limits are hard
    /// wherever it is, and one desktop uses it at a time.
    Loop,
}

/// How a home is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HomeOptions {
    /// How its files are kept.
    pub kind: HomeKind,
    /// What it may hold. A directory is limited as a project of its file system;
    /// in a file system of its own, files are limited to a few more than is said.
    pub quota: Quota,
}

impl HomeOptions {
    /// Whether it is a directory without limits.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// A user's files, in a directory or a file system of their own.
#[derive(Debug, Clone)]
pub struct Home {
    path: PathBuf,
    kind: HomeKind,
}

/// On a directory that was limited before anything was in it.
const LIMITED: &str = "trusted.qvd.limited";

impl Home {
    /// The home in the directory `dir`, on whatever file system that is; made from the image's `/etc/skel`, and
    /// given to the image's user, when it is not there yet. One that is there is
    /// taken as it is: no owner is changed. The directory that holds it must exist.
    ///
    /// # Errors
    /// It cannot be made, or is something else than a directory.
    pub fn open(dir: &Path, image: &Image) -> Result<Self, Error> {
        Self::open_with(dir, image, &HomeOptions::default())
    }

    /// As [`Home::open`], in this way: of kind [`HomeKind::Loop`] it is the file `path`,
    /// which can be on a network file system too.
    ///
    /// # Errors
    /// As [`Home::open`]; [`Error::Unsupported`] when a limit would not hold.
    pub fn open_with(path: &Path, image: &Image, options: &HomeOptions) -> Result<Self, Error> {
        match options.kind {
            HomeKind::Directory => Self::directory(path, image, options.quota),
            HomeKind::Loop => Self::file_system(path, image, options.quota),
        }
    }

    /// The home in a store: in `dir` or `disk`, by its kind. One that is there
    /// stays of the kind that it was made as, with the limits of then.
    pub(crate) fn in_store(dir: &Path, disk: &Path, image: &Image, options: &HomeOptions) -> Result<Self, Error> {
        let (own, other) = if options.kind == HomeKind::Loop { (disk, dir) } else { (dir, disk) };
        let there = |path: &Path| path.try_exists().map_err(Error::io("open home", path));
        if there(other)? && !there(own)? {
            let kind = if options.kind == HomeKind::Loop { HomeKind::Directory } else { HomeKind::Loop };
            tracing::info!(home = %other.display(), "a home keeps the kind and the limits that it was made with");
            return Ok(Self { path: other.to_path_buf(), kind });
        }
        Self::open_with(own, image, options)
    }

    fn directory(dir: &Path, image: &Image, quota: Quota) -> Result<Self, Error> {
        match fsio::open_dir(dir) {
            Ok(there) if !quota.is_unlimited() => limit_again(&there, dir, quota)?,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(dir, image, quota)?,
            Err(error) => return Err(Error::io("open home", dir)(error)),
        }
        Ok(Self { path: dir.to_path_buf(), kind: HomeKind::Directory })
    }

    fn file_system(path: &Path, image: &Image, quota: Quota) -> Result<Self, Error> {
        let bytes = quota.bytes.unwrap_or(UNLIMITED);
        match path.metadata() {
            Ok(about) if about.len() == bytes.get() => {}
            Ok(about) => {
                let why = format!("its file system keeps the size it was made with, {}", Bytes::new(about.len()));
                return Err(Error::Unsupported { op: "change the limits of a home", missing: Missing::Design(why) });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if bytes < Shape::SMALLEST.bytes {
                    let why = format!("a home's file system has at least {}", Shape::SMALLEST.bytes);
                    return Err(Error::Unsupported { op: "limit a home", missing: Missing::Design(why) });
                }
                create_disk(path, image, Shape { bytes, inodes: quota.inodes, journal: true })?;
            }
            Err(error) => return Err(Error::io("open home", path)(error)),
        }
        Ok(Self { path: path.to_path_buf(), kind: HomeKind::Loop })
    }

    /// Where it is: a directory, or the file with its file system.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.path
    }

    /// How its files are kept.
    #[must_use]
    pub const fn kind(&self) -> HomeKind {
        self.kind
    }

    /// Refuses the file of a home that is mounted.
    pub(crate) fn expect_unused(disk: &Path) -> Result<(), Error> {
        if looped::disk::in_use(disk)? { Err(Error::HomeBusy(disk.to_path_buf())) } else { Ok(()) }
    }

    /// Makes a detached mount of it, without set-user-id programs and device
    /// nodes. With `idmap`, owners show shifted by that user namespace's maps.
    ///
    /// # Errors
    /// It is gone; [`Error::Unsupported`] when its file system cannot be id-mapped;
    /// [`Error::HomeBusy`] when it has a file system of its own that is mounted.
    pub fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let mount = match self.kind {
            HomeKind::Directory => {
                let dir = mount::open_dir_path(&self.path).map_err(Error::io("open home", &self.path))?;
                mount::clone_dir(dir.as_fd()).map_err(|error| self.unmountable("bind its directory", error))?
            }
            HomeKind::Loop => {
                Self::expect_unused(&self.path)?;
                looped::disk::mount(&self.path)?
            }
        };
        let restrictions = Restrictions { nosuid: true, nodev: true, ..Restrictions::default() };
        match mount::restrict(mount.as_fd(), restrictions, idmap) {
            Ok(()) => Ok(mount),
            Err(error) if idmap.is_some() && Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                let missing = Missing::Filesystem(
                    "id-mapped mounts, as most network file systems do; use a home of kind `loop` there".to_owned(),
                );
                Err(Error::Unsupported { op: "mount a home with the ids of a desktop", missing })
            }
            Err(error) => Err(self.unmountable("restrict and id-map it", error)),
        }
    }

    fn unmountable(&self, step: &'static str, error: io::Error) -> Error {
        Error::Mount { what: format!("home `{}`", self.path.display()), source: MountError::new(step, error) }
    }
}

/// Limits a directory that is there anew, if all that is in it is counted.
fn limit_again(there: &OwnedFd, dir: &Path, quota: Quota) -> Result<(), Error> {
    match rustix::fs::fgetxattr(there, LIMITED, &mut [0_u8; 1]) {
        Ok(_) => quota::change(dir, quota),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => {
            let missing = Missing::Design("what a home without limits holds is not counted".to_owned());
            Err(Error::Unsupported { op: "limit a home that was made without", missing })
        }
        Err(error) => Err(Error::io("read the limits of home", dir)(error)),
    }
}

/// Makes a home beside its place and renames it there: it is whole or absent.
fn create(dir: &Path, image: &Image, quota: Quota) -> Result<(), Error> {
    let io = |op| Error::io(op, dir);
    let parent = dir.parent().unwrap_or(Path::new("/"));
    let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(io("make home"))?;
    let target = fsio::open_dir(scratch.path()).map_err(io("make home"))?;
    if !quota.is_unlimited() {
        quota::limit(scratch.path(), quota)?;
        let marked = rustix::fs::fsetxattr(&target, LIMITED, b"1", rustix::fs::XattrFlags::empty());
        marked.map_err(Error::io("limit home", dir))?;
    }
    fill(&target, dir, image)?;
    publish(scratch.path(), dir, parent).map_err(io("make home"))?;
    // The directory is gone from its temporary name, which is not an error.
    if let Err(error) = scratch.close()
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(home = %dir.display(), %error, "temporary home left behind");
    }
    Ok(())
}

/// As [`create`], in a file system of its own.
fn create_disk(path: &Path, image: &Image, shape: Shape) -> Result<(), Error> {
    let io = |op| Error::io(op, path);
    let parent = path.parent().unwrap_or(Path::new("/"));
    let scratch = tempfile::Builder::new().prefix(".new-").tempfile_in(parent).map_err(io("make home"))?;
    looped::disk::make(shape, scratch.path())?;
    {
        let mount = looped::disk::mount(scratch.path())?;
        let top = fsio::open_dir_below(&mount, ".").map_err(io("make home"))?;
        // A check of the file system makes it again when it needs it.
        match rustix::fs::unlinkat(&top, "lost+found", AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(io("make home")(io::Error::from(error))),
        }
        fill(&top, path, image)?;
    }
    scratch.as_file().sync_all().map_err(io("make home"))?;
    publish(scratch.path(), path, parent).map_err(io("make home"))
}

/// Gives a finished home its name, unless somebody was quicker and made the same.
fn publish(made: &Path, name: &Path, parent: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, made, CWD, name, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => Ok(()),
        // A network file system may not know that; what is there has then to be seen first.
        Err(Errno::INVAL | Errno::NOSYS) if !name.try_exists()? => std::fs::rename(made, name),
        other => Ok(other?),
    }?;
    fsio::sync_dir(parent)
}

/// Fills an empty home with the image's skeleton and gives it to its user.
fn fill(target: &OwnedFd, name: &Path, image: &Image) -> Result<(), Error> {
    let io = |op| {
        move |error: io::Error| match Errno::from_io_error(&error) {
            Some(Errno::PERM | Errno::ACCESS) => {
                let missing = Missing::Filesystem(
                    "owners that root may choose (a server that squashes root?); make the directory there, for its user"
                        .to_owned(),
                );
                Error::Unsupported { op: "give a home to its user", missing }
            }
            _ => Error::io(op, name)(error),
        }
    };
    let user = &image.config().user;
    let owner = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let tree = image.base().open()?;
    match fsio::open_dir_below(&tree, "etc/skel") {
        Ok(skel) => copy(skel.as_fd(), target.as_fd(), owner, 0).map_err(io("fill home"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read /etc/skel for home", name)(error)),
    }
    let finish = || -> io::Result<()> {
        fchown(target, Some(owner.0), Some(owner.1))?;
        fchmod(target, Mode::from_raw_mode(0o700))?;
        Ok(rustix::fs::syncfs(target)?)
    };
    finish().map_err(io("make home"))
}

/// Copies directories, files and links; links as such, and nothing else at all.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, owner: (Uid, Gid), depth: usize) -> io::Result<()> {
    if depth > SKEL_DEPTH_MAX {
        return Err(io::Error::other("/etc/skel is nested too deeply"));
    }
    for (name, kind) in trash::list(from)? {
        let name: &CString = &name;
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let (source, target) = (fsio::open_dir_below(from, name)?, fsio::open_dir_below(to, name)?);
                copy(source.as_fd(), target.as_fd(), owner, depth + 1)?;
                give(&target, &source, owner)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let source = openat(from, name, OFlags::RDONLY | flags, Mode::empty())?;
                let target = openat(to, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags, Mode::RUSR)?;
                let (mut source, mut target) = (File::from(source), File::from(target));
                io::copy(&mut source, &mut target)?;
                give(&target, &source, owner)?;
            }
            FileType::Symlink => {
                let link = readlinkat(from, name, Vec::new())?;
                symlinkat(&link, to, name)?;
                rustix::fs::chownat(to, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Gives a copy to its owner, with the mode of what it was copied from less
/// the set-id bits.
fn give(target: impl AsFd, source: impl AsFd, owner: (Uid, Gid)) -> io::Result<()> {
    let mode = rustix::fs::fstat(source)?.st_mode;
    fchown(&target, Some(owner.0), Some(owner.1))?;
    fchmod(&target, Mode::from_raw_mode(mode & 0o777))?;
    Ok(())
}
