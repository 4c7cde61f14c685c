//! Locks on bytes of a file that belong to the open file, not to the process:
//! closing another descriptor of the same file does not lose them.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Locks bytes for sharing, until the file is closed; `false` when somebody
/// has them alone.
///
/// # Errors
/// The file is not open for reading, or its file system has no such locks.
pub fn share(file: BorrowedFd<'_>, bytes: Range<u64>) -> io::Result<bool> {
    let mut lock = range(libc::F_RDLCK, &bytes)?;
    match control(file, libc::F_OFD_SETLK, &mut lock) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether anybody else has a lock on any of these bytes.
///
/// # Errors
/// The file system has no such locks.
pub fn is_locked(file: BorrowedFd<'_>, bytes: Range<u64>) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, &bytes)?;
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn range(kind: i32, bytes: &Range<u64>) -> io::Result<libc::flock> {
    let number = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    // SAFETY: a structure of integers, for which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    lock.l_whence = 0;
    lock.l_start = number(bytes.start)?;
    lock.l_len = number(bytes.end.saturating_sub(bytes.start))?;
    Ok(lock)
}

fn control(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands read and write one `flock`, which lives across the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_lock_is_seen_through_another_opening_and_goes_with_its_file() {
        // One of an own process: it is not another process that counts.
        let path = std::env::temp_dir().join(format!("qvd-ofd-{}", std::process::id()));
        let one = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let other = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(!is_locked(other.as_fd(), 0..10).unwrap());
        assert!(share(one.as_fd(), 5..6).unwrap());
        assert!(share(other.as_fd(), 5..6).unwrap());
        assert!(is_locked(one.as_fd(), 0..10).unwrap() && is_locked(other.as_fd(), 0..10).unwrap());
        assert!(!is_locked(other.as_fd(), 6..10).unwrap());
        drop(one);
        assert!(!is_locked(other.as_fd(), 0..10).unwrap(), "its own is no obstacle");
    }
}
