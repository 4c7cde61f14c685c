//! Questions about a host that several back ends ask, each answered by trying.

use std::{io, os::fd::AsFd, path::Path};

use qvd_core::{Missing, Support, UidRange};
use qvd_sys::mount::{self, Restrictions};
use rustix::{fs::ioctl_ficlone, io::Errno};

use crate::{Error, fsio};

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

/// A user namespace to try id-mapped mounts with, or why there is none.
pub(crate) fn userns() -> Result<std::os::fd::OwnedFd, Missing> {
    qvd_sys::userns::create(UidRange::FIRST, UidRange::LEN).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::PERM) => Missing::Privilege("make user namespaces".to_owned()),
        _ => Missing::Kernel("user namespaces".to_owned()),
    })
}
