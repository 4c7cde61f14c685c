//! Who uses a disk's file: the locks by which QEMU's processes know of each other.
//!
//! Source: QEMU `block/file-posix.c`, `RAW_LOCK_PERM_BASE` and
//! `RAW_LOCK_SHARED_BASE`, and the permissions in `include/block/block-common.h`.

use std::{fs::File, io, os::fd::AsFd, path::Path};

use qvd_sys::ofd;

/// Byte 100 and on: somebody uses a permission. Byte 200 and on: somebody does
/// not share it. Five permissions in the order of their bits.
const USED: u64 = 100;
const UNSHARED: u64 = 200;
const PERMISSIONS: u64 = 5;
/// To read consistently, to write, to write what is there, to resize.
const ALL: u64 = 4;

/// Whether a virtual machine, or somebody who works on disks as it does, has
/// this file open.
pub(super) fn in_use(file: &File) -> io::Result<bool> {
    ofd::is_locked(file.as_fd(), USED..UNSHARED + PERMISSIONS)
}

/// As [`in_use`], for a name; a file that is not there is not in use.
pub(super) fn path_in_use(path: &Path) -> io::Result<bool> {
    match File::open(path) {
        Ok(file) => in_use(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Keeps everybody else from this file until it is closed; `false` when
/// somebody has it.
pub(super) fn claim(file: &File) -> io::Result<bool> {
    for base in [USED, UNSHARED] {
        if !ofd::share(file.as_fd(), base..base + ALL)? {
            return Ok(false);
        }
    }
    Ok(!in_use(file)?)
}
