//! User namespaces as descriptors, for id-mapped mounts.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use crate::signals::BlockedSignals;

/// Stack of the child that creates the namespace. It calls nothing but the
/// C library's own exit path; the kernel's smallest signal frame with AVX-512
/// state would still fit.
const CHILD_STACK_BYTES: usize = 16 * 1024;

/// Makes a user namespace in which ids `0` up to `len` stand for host ids from
/// `base` on, for users and groups alike, and returns its descriptor.
///
/// No process is left in it: the namespace lives as long as the descriptor, or
/// a mount or a process made with it.
///
/// # Errors
/// User namespaces are switched off or exhausted (`ENOSPC`), or this process
/// may not map these ids (`EPERM`).
pub fn create(base: u32, len: u32) -> io::Result<OwnedFd> {
    let child = Child::spawn()?;
    let map = format!("0 {base} {len}\n");
    // A zombie keeps its credentials, and with them its namespace, until it is
    // reaped: nothing has to be kept running while the maps are written.
    for file in ["uid_map", "gid_map"] {
        // The kernel takes a map in one write only, so not `write_all`.
        let path = format!("/proc/{}/{file}", child.pid);
        let written = OpenOptions::new().write(true).open(path)?.write(map.as_bytes())?;
        if written != map.len() {
            return Err(io::Error::other("the id map was taken in part only"));
        }
    }
    Ok(File::open(format!("/proc/{}/ns/user", child.pid))?.into())
}

/// A child that has ended at once and waits to be reaped.
#[derive(Debug)]
struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Child {
    fn spawn() -> io::Result<Self> {
        extern "C" fn exit_at_once(_: *mut libc::c_void) -> libc::c_int {
            0
        }
        // Aligned as every ABI asks; the top is what `clone` takes.
        let mut stack = vec![0_u128; CHILD_STACK_BYTES / size_of::<u128>()];
        let top = stack.as_mut_ptr_range().end;
        let mut pidfd: RawFd = -1;
        // No exit signal: an embedder's SIGCHLD handler or `waitpid(-1)` must
        // neither hear of this child nor reap it before we do.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD;
        let unblock = BlockedSignals::all()?;
        // SAFETY: the child runs `exit_at_once` on a stack of its own, which
        // outlives it because CLONE_VFORK holds this thread until the child is
        // gone. It touches no memory of ours, and with all signals blocked no
        // handler of ours can run in it. CLONE_PIDFD stores into `pidfd`.
        let pid = unsafe {
            libc::clone(exit_at_once, top.cast(), flags, std::ptr::null_mut(), std::ptr::from_mut(&mut pidfd))
        };
        let error = io::Error::last_os_error();
        drop(unblock);
        if pid < 0 {
            return Err(error);
        }
        // SAFETY: the kernel has just opened it for us, and nobody else knows it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Self { pid, pidfd })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: an all-zero siginfo_t is a valid value of a plain C struct.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = libc::id_t::try_from(self.pidfd.as_raw_fd()).unwrap_or_default();
        // __WALL, because a child without an exit signal is not waited for
        // otherwise. It cannot fail: the child is ours and has ended.
        // SAFETY: `info` is valid for writing.
        let _reaped = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | libc::__WALL) };
    }
}
