//! What an init inherits from whoever started it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::io::FdFlags;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes over the descriptors that this process was started with, and closes
/// them on exec from now on. Call it first in `main`, before anything opens a
/// descriptor: the numbers are a contract with whoever started the process.
///
/// # Errors
/// One of them is not open, or this process took them before.
pub fn inherited<const N: usize>(numbers: [RawFd; N]) -> io::Result<[OwnedFd; N]> {
    if numbers.iter().any(|&number| number <= 2) || TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "descriptors were taken before"));
    }
    for number in numbers {
        // SAFETY: only borrowed for the check that it is open.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    }
    // SAFETY: they are open, and owned by nobody: they are not the standard
    // ones, nothing was opened before this call, and it succeeds only once.
    let fds = numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) });
    debug_assert!(fds.iter().zip(numbers).all(|(fd, number)| fd.as_raw_fd() == number));
    Ok(fds)
}
