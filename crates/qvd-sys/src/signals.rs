//! Which signals a thread takes.

use std::io;

/// All signals blocked on this thread until dropped.
pub(crate) struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    pub(crate) fn all() -> io::Result<Self> {
        // SAFETY: both sets are plain C structs that the calls fill.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
                0 => Ok(Self(before)),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by `pthread_sigmask`.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// The signals that this thread blocks, as the kernel has them: bit 0 is signal 1.
pub(crate) fn blocked() -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: a null new mask only asks; the kernel writes the stated size, the size of its set.
    let asked = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            std::ptr::null::<u64>(),
            &raw mut mask,
            size_of::<u64>(),
        )
    };
    if asked == 0 { Ok(mask) } else { Err(io::Error::last_os_error()) }
}
