//! Limits on what a directory holds, where the file system has projects.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
};

use qvd_core::{Missing, Support};
use qvd_sys::quota;
use rustix::io::Errno;

use crate::{Error, Quota, fsio};

/// Projects of roots have this bit, to keep out of the way of those that an
/// administrator numbers by hand.
const OURS: u32 = 1 << 31;

/// Limits the directory `dir`, which is empty still: what is made in it counts.
/// Its project is the number of its inode, so that nobody has to keep a list:
/// no two directories have the same, also after a crash.
///
/// # Errors
/// [`Error::Unsupported`] when the file system cannot.
pub(crate) fn limit(dir: &Path, limits: Quota) -> Result<(), Error> {
    if limits.is_unlimited() {
        return Ok(());
    }
    change(dir, limits)
}

/// Limits a root whose files are not there yet (`had` is `None`), or changes
/// the limits it was made with.
///
/// # Errors
/// As [`limit`]; also when it was made without.
pub(crate) fn renew(dir: &Path, had: Option<Quota>, wanted: Quota) -> Result<(), Error> {
    match had {
        Some(has) if has == wanted => Ok(()),
        Some(has) if has.is_unlimited() => {
            let missing = Missing::Design("what a root without limits holds is not counted".to_owned());
            Err(Error::Unsupported { op: "limit a root that was made without", missing })
        }
        Some(_) => change(dir, wanted),
        None => limit(dir, wanted).inspect_err(|_| {
            // Only one that was just made is empty.
            if let Err(error) = std::fs::remove_dir(dir)
                && error.kind() != io::ErrorKind::DirectoryNotEmpty
            {
                tracing::warn!(path = %dir.display(), %error, "root without its limit left behind");
            }
        }),
    }
}

/// Changes the limits of a directory that has some.
///
/// # Errors
/// As [`limit`].
pub(crate) fn change(dir: &Path, limits: Quota) -> Result<(), Error> {
    match try_limit(dir, limits)? {
        Support::No(missing) => Err(Error::Unsupported { op: "limit roots", missing }),
        _ => Ok(()),
    }
}

/// Whether directories below `place` can be limited, found by limiting one.
pub(crate) fn support(place: &Path) -> Result<Support, Error> {
    let io = |error| Error::io("probe quotas below", place)(error);
    let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(place).map_err(io)?;
    let one_mebibyte = qvd_core::Bytes::mib(1);
    let found = try_limit(scratch.path(), Quota { bytes: Some(one_mebibyte), inodes: Some(16) })?;
    if found.is_yes() {
        apply(scratch.path(), 0, 0).map_err(io)?;
    }
    Ok(found)
}

fn try_limit(dir: &Path, limits: Quota) -> Result<Support, Error> {
    let bytes = limits.bytes.map_or(0, qvd_core::Bytes::get);
    let error = match apply(dir, bytes, limits.inodes.unwrap_or(0)) {
        Ok(()) => return Ok(Support::Yes),
        Err(error) => error,
    };
    let missing = match Errno::from_io_error(&error) {
        Some(Errno::PERM) => Missing::Privilege("limit projects".to_owned()),
        Some(
            Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS | Errno::SRCH | Errno::RANGE,
        ) => Missing::Filesystem(
            "project quotas (ext4 or XFS mounted with `prjquota`, in a kernel that has them); use `loop` for limits"
                .to_owned(),
        ),
        _ => return Err(Error::io("limit", dir)(error)),
    };
    Ok(Support::No(missing))
}

fn apply(dir: &Path, bytes: u64, inodes: u64) -> io::Result<()> {
    let dir = File::from(fsio::open_dir(dir)?);
    let inode = u32::try_from(dir.metadata()?.ino()).ok().filter(|inode| inode & OURS == 0);
    let project = inode.ok_or_else(|| io::Error::from(Errno::RANGE))? | OURS;
    // The limit first: a file system without quotas is left as it was.
    quota::limit_project(dir.as_fd(), project, bytes, inodes)?;
    quota::set_project(dir.as_fd(), project)
}
