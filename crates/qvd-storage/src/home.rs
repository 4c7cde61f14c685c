//! Homes: the users' files, kept apart from roots and images.

mod skeleton;

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, DesktopId, Missing, UserName};
use qvd_sys::mount::{self, MountError, Restrictions};
use rustix::{fs::AtFlags, io::Errno};

use serde::{Deserialize, Serialize};

use crate::{
    Error, Image, Quota,
    backend::looped::{self, UNLIMITED, disk::Shape},
    fsio,
    home::skeleton::Fresh,
    quota,
};

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
        let (home, fresh) = Self::find(path, image, options)?;
        fresh.map_or(Ok(()), |fresh| fresh.settle().map_err(Error::io("make home", path)))?;
        Ok(home)
    }

    fn find(path: &Path, image: &Image, options: &HomeOptions) -> Result<(Self, Option<Fresh>), Error> {
        match options.kind {
            HomeKind::Directory => Self::directory(path, image, options.quota),
            HomeKind::Loop => Ok((Self::file_system(path, image, options.quota)?, None)),
        }
    }

    /// The home in a store: in `dir` or `disk`, by its kind. One that is there
    /// stays of the kind that it was made as, with the limits of then. What it
    /// holds may have to be brought to disk yet.
    pub(crate) fn in_store(
        dir: &Path,
        disk: &Path,
        image: &Image,
        options: &HomeOptions,
    ) -> Result<(Self, Option<Fresh>), Error> {
        let (own, other) = if options.kind == HomeKind::Loop { (disk, dir) } else { (dir, disk) };
        let there = |path: &Path| path.try_exists().map_err(Error::io("open home", path));
        if there(other)? && !there(own)? {
            let kind = if options.kind == HomeKind::Loop { HomeKind::Directory } else { HomeKind::Loop };
            tracing::info!(home = %other.display(), "a home keeps the kind and the limits that it was made with");
            return Ok((Self { path: other.to_path_buf(), kind }, None));
        }
        Self::find(own, image, options)
    }

    fn directory(dir: &Path, image: &Image, quota: Quota) -> Result<(Self, Option<Fresh>), Error> {
        let fresh = match fsio::open_dir(dir) {
            Ok(there) => {
                if !quota.is_unlimited() {
                    limit_again(&there, dir, quota)?;
                }
                Fresh::found(there, dir, image)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(create(dir, image, quota)?),
            Err(error) => return Err(Error::io("open home", dir)(error)),
        };
        Ok((Self { path: dir.to_path_buf(), kind: HomeKind::Directory }, fresh))
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
fn create(dir: &Path, image: &Image, quota: Quota) -> Result<Fresh, Error> {
    let io = |op| Error::io(op, dir);
    let parent = dir.parent().unwrap_or(Path::new("/"));
    let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(io("make home"))?;
    let target = fsio::open_dir(scratch.path()).map_err(io("make home"))?;
    if !quota.is_unlimited() {
        quota::limit(scratch.path(), quota)?;
        let marked = rustix::fs::fsetxattr(&target, LIMITED, b"1", rustix::fs::XattrFlags::empty());
        marked.map_err(Error::io("limit home", dir))?;
    }
    skeleton::supply(&target, dir, image)?;
    let fresh = Fresh::mark(target, dir, image)?;
    publish(scratch.path(), dir).map_err(io("make home"))?;
    // The directory is gone from its temporary name, which is not an error.
    if let Err(error) = scratch.close()
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(home = %dir.display(), %error, "temporary home left behind");
    }
    Ok(fresh)
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
        skeleton::supply(&top, path, image)?;
        rustix::fs::syncfs(&top).map_err(|error| io("make home")(error.into()))?;
    }
    scratch.as_file().sync_all().map_err(io("make home"))?;
    publish(scratch.path(), path).and_then(|()| fsio::sync_dir(parent)).map_err(io("make home"))
}

/// Gives a finished home its name, unless somebody was quicker and made the same.
fn publish(made: &Path, name: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, made, CWD, name, RenameFlags::NOREPLACE) {
        Err(Errno::EXIST) => Ok(()),
        // A network file system may not know that; what is there has then to be seen first.
        Err(Errno::INVAL | Errno::NOSYS) if !name.try_exists()? => std::fs::rename(made, name),
        other => Ok(other?),
    }
}
