//! What block devices can do beside reading and writing.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Source: Linux `include/uapi/linux/fs.h`, `BLKDISCARD`.
const DISCARD: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 119);

/// Says that nobody needs these bytes of an open block device any more. Begin and
/// length are whole sectors; what shows there afterwards depends on the device.
///
/// # Errors
/// `EOPNOTSUPP` when the device knows no such thing, `EINVAL` when they are not whole sectors.
pub fn discard(device: BorrowedFd<'_>, at: u64, length: u64) -> io::Result<()> {
    let range = [at, length];
    // SAFETY: the kernel reads two numbers of 64 bits from a place that lives as long as the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(DISCARD), range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
