//! Limits on directories: projects of ext4 and XFS.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// What the kernel keeps of a file beside its mode.
///
/// Source: Linux `include/uapi/linux/fs.h`, `struct fsxattr`.
#[repr(C)]
#[derive(Debug, Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// New files in the directory get its project.
///
/// Source: Linux `include/uapi/linux/fs.h`, `FS_XFLAG_PROJINHERIT`.
const PROJINHERIT: u32 = 0x200;

/// Source: Linux `include/uapi/linux/fs.h`, `FS_IOC_FSGETXATTR`, `FS_IOC_FSSETXATTR`.
const GET: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<FsXattr>(b'X', 31);
const SET: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<FsXattr>(b'X', 32);

/// Puts a directory, and what will be made in it, into a project.
///
/// # Errors
/// `EOPNOTSUPP` or `ENOTTY` when the file system has no projects, `EINVAL`
/// when it was not made with them.
pub fn set_project(dir: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    let mut attributes = FsXattr::default();
    // SAFETY: the operation fills in exactly this structure.
    if unsafe { libc::ioctl(dir.as_raw_fd(), libc::Ioctl::from(GET), &raw mut attributes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.projid = project;
    attributes.xflags |= PROJINHERIT;
    // SAFETY: the operation reads exactly this structure.
    if unsafe { libc::ioctl(dir.as_raw_fd(), libc::Ioctl::from(SET), &raw const attributes) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Limits a project on the file system that `on` is on. Zero means no limit.
/// Bytes are counted in whole KiB.
///
/// # Errors
/// `ENOSYS` or `ENOTSUP` when the kernel has no quotas for this file system,
/// `ESRCH` when they are off, `EPERM` without the privilege.
pub fn limit_project(on: BorrowedFd<'_>, project: u32, bytes: u64, inodes: u64) -> io::Result<()> {
    // Source: Linux `include/uapi/linux/quota.h`: QCMD, Q_SETQUOTA, PRJQUOTA,
    // QIF_LIMITS (QIF_BLIMITS and QIF_ILIMITS).
    const SET_PROJECT_QUOTA: libc::c_uint = (0x80_0008 << 8) | 2;
    const LIMITS: u32 = 1 | 4;
    // SAFETY: all zeroes are a valid `dqblk`, which holds numbers alone.
    let mut limits: libc::dqblk = unsafe { std::mem::zeroed() };
    limits.dqb_bhardlimit = bytes.div_ceil(1024);
    limits.dqb_ihardlimit = inodes;
    limits.dqb_valid = LIMITS;
    // SAFETY: the structure is the kernel's, and lives for the call; the
    // descriptor is borrowed for it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            on.as_raw_fd(),
            SET_PROJECT_QUOTA,
            libc::c_ulong::from(project),
            &raw const limits,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
