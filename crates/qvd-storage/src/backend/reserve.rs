//! Files that take what a limit forbids.

use std::{io, os::fd::AsFd, path::Path};

use qvd_core::Missing;
use rustix::{
    fs::{Mode, OFlags, mkdirat, openat},
    io::Errno,
};

use crate::Error;

/// Where the files are, beside a root's own.
pub(super) const RESERVED: &str = "reserved";

/// Each takes some microseconds, and a few bytes of the disk for its name.
const MOST_RESERVED: u64 = 1 << 16;

/// Leaves no more than `inodes` files to be made on the file system of `own`: the
/// tool that makes it rounds up, by some for each 128 MiB of its size. The
/// rest is taken by empty files beside the root. `what` names it in errors.
pub(super) fn inodes(own: impl AsFd, inodes: u64, what: &Path) -> Result<(), Error> {
    let io = |error: Errno| Error::io("limit the files of disk", what)(io::Error::from(error));
    match mkdirat(&own, RESERVED, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(io(error)),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let reserved = openat(&own, RESERVED, flags, Mode::empty()).map_err(io)?;
    let free = rustix::fs::fstatvfs(&own).map_err(io)?.f_ffree;
    let surplus = free.saturating_sub(inodes);
    if surplus > MOST_RESERVED {
        let least = free - MOST_RESERVED;
        let missing = Missing::Design(format!("a file system of that size has room for {least} files or more"));
        return Err(Error::Unsupported { op: "limit the files of a root", missing });
    }
    for number in 0..surplus {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(&reserved, number.to_string(), flags, Mode::empty()).map_err(io)?;
    }
    Ok(())
}
