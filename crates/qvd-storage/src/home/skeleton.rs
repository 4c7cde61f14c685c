//! What a new home holds at first, and how that comes to the disk.
//!
//! Who starts a desktop does not wait for a disk, which may be busy with what
//! another desktop writes. So a new home is *fresh*: it bears the id of the boot in
//! which it was made, until all of it is known to be on disk. One that is still fresh
//! in a later boot may have lost what was not written; what its skeleton lacks
//! is supplied once more, and nothing else of it is touched.

use std::{
    ffi::CString,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::Missing;
use qvd_sys::process::boot_id;
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags, fchmod, fchown, fgetxattr, fremovexattr, fsetxattr,
        fstat, fsync, mkdirat, openat, readlinkat, symlinkat, unlinkat,
    },
    io::Errno,
};

use crate::{Error, Image, fsio, trash};

/// Directories nested deeper than this in a skeleton are not one's idea of a home.
const SKEL_DEPTH_MAX: usize = 32;

/// On a fresh home: the boot in which it was made.
const FRESH: &str = "trusted.qvd.fresh";

/// Not blocking, because a user may have put a fifo in a file's place.
const FILE: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// A home of which not all is known to be on disk.
#[derive(Debug)]
pub(crate) struct Fresh {
    dir: OwnedFd,
    path: PathBuf,
    image: Image,
}

impl Fresh {
    /// Marks a home that was just filled, before it gets its name `path`. What a
    /// file system that cannot keep the mark holds is brought to disk at once.
    pub(super) fn mark(dir: OwnedFd, path: &Path, image: &Image) -> Result<Self, Error> {
        let io = Error::io("make home", path);
        let marked = || -> io::Result<()> {
            match fsetxattr(&dir, FRESH, boot_id()?.as_bytes(), XattrFlags::empty()) {
                Err(Errno::OPNOTSUPP) => Ok(rustix::fs::syncfs(&dir)?),
                done => Ok(done?),
            }
        };
        marked().map_err(io)?;
        Ok(Self { dir, path: path.to_path_buf(), image: image.clone() })
    }

    /// What there is to do for a home that was found. One of an earlier boot is
    /// supplied anew before anybody uses it.
    pub(super) fn found(dir: OwnedFd, path: &Path, image: &Image) -> Result<Option<Self>, Error> {
        let mut boot = [0_u8; 64];
        match fgetxattr(&dir, FRESH, &mut boot) {
            Ok(len) => {
                let now = boot_id().map_err(Error::io("read the boot's id for home", path))?;
                if boot.get(..len) != Some(now.as_bytes()) {
                    tracing::warn!(home = %path.display(), "the host stopped when it was new: its skeleton is looked through");
                    supply(&dir, path, image)?;
                }
                Ok(Some(Self { dir, path: path.to_path_buf(), image: image.clone() }))
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(Error::io("read the age of home", path)(error)),
        }
    }

    /// Brings it to disk: its skeleton, its directories and its name.
    pub(super) fn settle(self) -> io::Result<()> {
        let tree = self.image.base().open().map_err(io::Error::other)?;
        match fsio::open_dir_below(&tree, "etc/skel") {
            Ok(skel) => sync(skel.as_fd(), self.dir.as_fd(), 0)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => fsync(&self.dir)?,
            Err(error) => return Err(error),
        }
        fsio::sync_dir(self.path.parent().unwrap_or(Path::new("/")))?;
        match fremovexattr(&self.dir, FRESH) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// As [`Fresh::settle`], where nobody waits for the outcome: it stays fresh then.
    pub(crate) fn settle_or_say(self) {
        let path = self.path.clone();
        if let Err(error) = self.settle() {
            tracing::warn!(home = %path.display(), %error, "it is not known to be on disk");
        }
    }
}

/// Adds to a home what it lacks of the image's skeleton, and gives it to its user.
pub(super) fn supply(target: &OwnedFd, name: &Path, image: &Image) -> Result<(), Error> {
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
        Ok(skel) => add(skel.as_fd(), target.as_fd(), owner, 0).map_err(io("fill home"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read /etc/skel for home", name)(error)),
    }
    let give = || -> io::Result<()> {
        fchown(target, Some(owner.0), Some(owner.1))?;
        Ok(fchmod(target, Mode::from_raw_mode(0o700))?)
    };
    give().map_err(io("make home"))
}

/// Copies directories, files and links that are absent or cut short; links as
/// such, and nothing else at all.
fn add(from: BorrowedFd<'_>, to: BorrowedFd<'_>, owner: (Uid, Gid), depth: usize) -> io::Result<()> {
    for (name, kind) in entries(from, depth)? {
        match kind {
            FileType::Directory => {
                let made = match mkdirat(to, &name, Mode::RWXU) {
                    Err(Errno::EXIST) => false,
                    done => done.map(|()| true)?,
                };
                let source = fsio::open_dir_below(from, &name)?;
                let Some(target) = opened(fsio::open_dir_below(to, &name))? else { continue };
                add(source.as_fd(), target.as_fd(), owner, depth + 1)?;
                if made {
                    give(&target, &source, owner)?;
                }
            }
            FileType::RegularFile => {
                let mut source = File::from(openat(from, &name, OFlags::RDONLY | FILE, Mode::empty())?);
                let there = opened(openat(to, &name, OFlags::RDONLY | FILE, Mode::empty()))?;
                match there.map(File::from) {
                    Some(there) if !is_cut_short(&there, &source)? => continue,
                    Some(_) => unlinkat(to, &name, AtFlags::empty())?,
                    None => {}
                }
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | FILE;
                let mut target = match openat(to, &name, flags, Mode::RUSR) {
                    // Something else of the user's.
                    Err(Errno::EXIST) => continue,
                    made => File::from(made?),
                };
                source.rewind()?;
                io::copy(&mut source, &mut target)?;
                give(&target, &source, owner)?;
            }
            FileType::Symlink => {
                let link = readlinkat(from, &name, Vec::new())?;
                match symlinkat(&link, to, &name) {
                    Err(Errno::EXIST) => continue,
                    made => made?,
                }
                rustix::fs::chownat(to, &name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Brings what a home has of its skeleton to disk, and the names of that.
fn sync(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    for (name, kind) in entries(from, depth)? {
        match kind {
            FileType::Directory => {
                let Some(target) = opened(fsio::open_dir_below(to, &name))? else { continue };
                sync(fsio::open_dir_below(from, &name)?.as_fd(), target.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => {
                let Some(there) = opened(openat(to, &name, OFlags::RDONLY | FILE, Mode::empty()))? else { continue };
                if is_regular(&there)? {
                    fsync(&there)?;
                }
            }
            _ => {}
        }
    }
    Ok(fsync(to)?)
}

fn entries(skeleton: BorrowedFd<'_>, depth: usize) -> io::Result<Vec<(CString, FileType)>> {
    if depth > SKEL_DEPTH_MAX {
        return Err(io::Error::other("/etc/skel is nested too deeply"));
    }
    trash::list(skeleton)
}

/// What was opened in a home, unless its user removed it or put something else there.
fn opened<E>(result: Result<OwnedFd, E>) -> io::Result<Option<OwnedFd>>
where
    io::Error: From<E>,
{
    match result.map_err(io::Error::from) {
        Ok(there) => Ok(Some(there)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO | Errno::XDEV) => Ok(None),
            _ => Err(error),
        },
    }
}

fn is_regular(file: impl AsFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::RegularFile)
}

/// Whether a file is a beginning of the skeleton's and no more.
fn is_cut_short(there: &File, skeleton: &File) -> io::Result<bool> {
    let len = there.metadata()?.len();
    if !is_regular(there)? || len >= skeleton.metadata()?.len() {
        return Ok(false);
    }
    let [mut ours, mut theirs] = [there, skeleton].map(|file| BufReader::new(file.take(len)).bytes());
    loop {
        match (ours.next().transpose()?, theirs.next().transpose()?) {
            (None, _) => return Ok(true),
            (one, other) if one != other => return Ok(false),
            _ => {}
        }
    }
}

/// Gives a copy to its owner, with the mode of what it was copied from less
/// the set-id bits.
fn give(target: impl AsFd, source: impl AsFd, owner: (Uid, Gid)) -> io::Result<()> {
    let mode = fstat(source)?.st_mode;
    fchown(&target, Some(owner.0), Some(owner.1))?;
    fchmod(&target, Mode::from_raw_mode(mode & 0o777))?;
    Ok(())
}
