//! Questions about a host that several back ends ask, each answered by trying.

use std::{fs, io, os::fd::AsFd, path::Path, time::SystemTime};

use qvd_core::{Missing, Support, UidRange};
use qvd_sys::mount::{self, Restrictions};
use rustix::{
    fs::{Mode, OFlags, ioctl_ficlone, openat},
    io::Errno,
};

use crate::{
    Error, ImageConfig, fsio,
    repository::{NewCommit, Repository},
};

/// Whether files under `dir` can share extents, found by sharing one.
pub(crate) fn reflink(dir: &Path) -> io::Result<Support> {
    let (from, to) = (tempfile::tempfile_in(dir)?, tempfile::tempfile_in(dir)?);
    match ioctl_ficlone(&to, &from) {
        Ok(()) => Ok(Support::Yes),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => {
            Ok(Support::No(Missing::Filesystem("reflink".to_owned())))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether `dir` can be had as a detached mount, id-mapped or not.
pub(crate) fn bind(dir: &Path, id_mapped: bool) -> Result<Support, Error> {
    let userns = if id_mapped {
        match userns() {
            Ok(userns) => Some(userns),
            Err(missing) => return Ok(Support::No(missing)),
        }
    } else {
        None
    };
    let tried = fsio::open_dir(dir).and_then(|dir| {
        let mount = mount::clone_dir(dir.as_fd())?;
        let idmap = userns.as_ref().map(AsFd::as_fd);
        mount::restrict(mount.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)
    });
    match tried {
        Ok(()) => Ok(Support::Yes),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::PERM) => Ok(Support::No(Missing::Privilege("mount file systems".to_owned()))),
            Some(Errno::NOSYS) => Ok(Support::No(Missing::Kernel("the mount API of Linux 5.12".to_owned()))),
            Some(Errno::INVAL) if id_mapped => Ok(Support::No(Missing::Filesystem("id-mapped mounts".to_owned()))),
            _ => Err(Error::io("probe mounts of", dir)(error)),
        },
    }
}

/// Whether an image of a repository below `dir` can be mounted and read, found by doing it.
pub(crate) fn images(dir: &Path) -> Result<Support, Error> {
    // More than an image keeps beside a file's name.
    const CONTENT: &[u8] = &[1; 4096];
    let io = |error| Error::io("probe images below", dir)(error);
    let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(dir).map_err(io)?;
    let source = scratch.path().join("source");
    fs::create_dir(&source).and_then(|()| fs::write(source.join("file"), CONTENT)).map_err(io)?;
    let repository = Repository::open(&scratch.path().join("repository"))?;
    let staging = repository.stage()?;
    let new = NewCommit {
        config: ImageConfig::plain("probe".parse().map_err(|_| io(io::ErrorKind::InvalidInput.into()))?),
        author: "probe".to_owned(),
        message: String::new(),
        time: SystemTime::UNIX_EPOCH,
        recipe: None,
        publish: false,
    };
    let id = repository.commit_tree(&staging, &staging.scan(&source, &|_| false)?, new)?;
    let mount = match repository.base(id)?.open() {
        Ok(mount) => mount,
        Err(Error::Unsupported { missing, .. }) => return Ok(Support::No(missing)),
        Err(Error::Mount { source, .. }) => {
            let missing = match Errno::from_io_error(source.io()) {
                Some(Errno::PERM | Errno::ACCESS) => Missing::Privilege("mount file systems".to_owned()),
                _ => Missing::Kernel(format!("what images need: {source}")),
            };
            return Ok(Support::No(missing));
        }
        Err(error) => return Err(error),
    };
    let file = openat(&mount, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let content = file.map_err(io::Error::from).and_then(|file| io::read_to_string(fs::File::from(file)));
    match content {
        Ok(content) if content.as_bytes() == CONTENT => Ok(Support::Yes),
        Ok(_) => Ok(Support::No(Missing::Kernel("layers of content that show as they are".to_owned()))),
        Err(error) => Ok(Support::No(Missing::Kernel(format!("layers of content that can be read: {error}")))),
    }
}

/// A user namespace to try id-mapped mounts with, or why there is none.
pub(crate) fn userns() -> Result<std::os::fd::OwnedFd, Missing> {
    qvd_sys::userns::create(UidRange::FIRST, UidRange::LEN).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::PERM) => Missing::Privilege("make user namespaces".to_owned()),
        _ => Missing::Kernel("user namespaces".to_owned()),
    })
}
