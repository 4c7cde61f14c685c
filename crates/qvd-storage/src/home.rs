//! Homes: the users' files, kept apart from roots and images.

use std::{
    ffi::CString,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::{DesktopId, UserName};
use qvd_sys::mount::{self, MountError, Restrictions};
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, openat, readlinkat, symlinkat},
    io::Errno,
};

use crate::{Error, Image, fsio, trash};

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

/// A directory with a user's files.
#[derive(Debug, Clone)]
pub struct Home {
    dir: PathBuf,
}

impl Home {
    /// The home in the directory `dir`; made from the image's `/etc/skel`, and
    /// given to the image's user, when it is not there yet. The directory that
    /// holds it must exist.
    ///
    /// # Errors
    /// It cannot be made, or is something else than a directory.
    pub fn open(dir: &Path, image: &Image) -> Result<Self, Error> {
        match fsio::open_dir(dir) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(dir, image)?,
            Err(error) => return Err(Error::io("open home", dir)(error)),
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes a detached mount of it, without set-user-id programs and device
    /// nodes. With `idmap`, owners show shifted by that user namespace's maps.
    ///
    /// # Errors
    /// It is gone, or its file system cannot be id-mapped.
    pub fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let dir = mount::open_dir_path(&self.dir).map_err(Error::io("open home", &self.dir))?;
        let bind = || {
            let mount = mount::clone_dir(dir.as_fd())?;
            let restrictions = Restrictions { nosuid: true, nodev: true, ..Restrictions::default() };
            mount::restrict(mount.as_fd(), restrictions, idmap)?;
            Ok(mount)
        };
        bind().map_err(|error| Error::Mount {
            what: format!("home `{}`", self.dir.display()),
            source: MountError::new("bind and id-map its directory", error),
        })
    }
}

/// Makes a home beside its place and renames it there: it is whole or absent.
fn create(dir: &Path, image: &Image) -> Result<(), Error> {
    let io = |op| Error::io(op, dir);
    let parent = dir.parent().unwrap_or(Path::new("/"));
    let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(parent).map_err(io("make home"))?;
    let user = &image.config().user;
    let owner = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let target = fsio::open_dir(scratch.path()).map_err(io("make home"))?;
    let tree = image.base().open()?;
    match fsio::open_dir_below(&tree, "etc/skel") {
        Ok(skel) => copy(skel.as_fd(), target.as_fd(), owner, 0).map_err(io("fill home"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read /etc/skel for home")(error)),
    }
    let finish = || -> io::Result<()> {
        fchown(&target, Some(owner.0), Some(owner.1))?;
        fchmod(&target, Mode::from_raw_mode(0o700))?;
        rustix::fs::syncfs(&target)?;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(rustix::fs::CWD, scratch.path(), rustix::fs::CWD, dir, flags) {
            // Somebody was quicker and made the same: that one stays.
            Err(Errno::EXIST) => return Ok(()),
            other => other?,
        }
        fsio::sync_dir(parent)
    };
    finish().map_err(io("make home"))?;
    // The directory is gone from its temporary name, which is not an error.
    if let Err(error) = scratch.close()
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(home = %dir.display(), %error, "temporary home left behind");
    }
    Ok(())
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
