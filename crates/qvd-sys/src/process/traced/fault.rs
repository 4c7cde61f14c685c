//! Calls that fail on demand.
//!
//! The child says which call is to fail by a call that no kernel knows and that
//! the tracer answers. So one child tries every call of an operation, one after
//! the other, as a process does that lives on after a failure. The call may be
//! its own, or one of a program that it started and now asks for something.

use std::{
    ffi::{c_long, c_void},
    io, ptr,
};

/// Not an option of prctl(2): without a tracer it is refused.
const ARM: c_long = 0x5156_4446;

/// What is to fail.
#[derive(Debug)]
pub(super) struct Fault {
    /// How many calls pass before it.
    passing: u64,
    errno: u64,
    /// Whose; of none, it is of all that execute no program.
    of: Option<libc::pid_t>,
    /// The call that it was.
    failed: Option<c_long>,
}

/// Lets the call after `passing` others fail with `errno`, of all that this
/// process and its children make which have executed no program. Calls that a
/// library makes for its own memory and locks do not count.
///
/// # Errors
/// Nobody traces this process, or not on this architecture.
pub fn fail_after(passing: u32, errno: i32) -> io::Result<()> {
    ask(1, passing.into(), errno.into(), 0).map(drop)
}

/// As [`fail_after`], but of the calls that one process makes, whatever program it
/// executes, and its children from now on until they have executed their second
/// program: by way of the first, programs prepare themselves. It was started by this process.
///
/// # Errors
/// As [`fail_after`].
pub fn fail_after_in(pid: u32, passing: u32, errno: i32) -> io::Result<()> {
    ask(1, passing.into(), errno.into(), pid.into()).map(drop)
}

/// Lets no call fail any more, and tells the number of the one that did.
///
/// # Errors
/// Nobody traces this process.
pub fn failed() -> io::Result<Option<c_long>> {
    let answer = ask(0, 0, 0, 0)?;
    Ok((answer > 0).then(|| answer - 1))
}

fn ask(arm: c_long, passing: c_long, errno: c_long, of: c_long) -> io::Result<c_long> {
    // SAFETY: all numbers; a kernel without our tracer refuses the option.
    match unsafe { libc::syscall(libc::SYS_prctl, ARM, arm, passing, errno, of) } {
        answer @ 0.. => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Fault {
    /// What a call asks the tracer for, if it does.
    pub(super) fn asked(number: u64, arguments: &[u64; 6]) -> Option<Option<Self>> {
        let [option, arm, passing, errno, of, _] = *arguments;
        let ours = number.cast_signed() == libc::SYS_prctl && option.cast_signed() == ARM;
        let of = libc::pid_t::try_from(of).ok().filter(|pid| *pid != 0);
        ours.then(|| (arm == 1).then_some(Self { passing, errno, of, failed: None }))
    }

    /// Whose calls count, if it is one process's.
    pub(super) const fn of(&self) -> Option<libc::pid_t> {
        self.of
    }

    /// Whether this call is the one.
    pub(super) fn hits(&mut self, number: u64, arguments: &[u64; 6]) -> bool {
        let number = number.cast_signed();
        let [_, _, new_limit, ..] = *arguments;
        // Asking for a limit of one's own cannot fail.
        let asks = number == libc::SYS_prlimit64 && new_limit == 0;
        if self.failed.is_some() || asks || UNCOUNTED.contains(&number) {
            return false;
        }
        if self.passing == 0 {
            self.failed = Some(number);
            return true;
        }
        self.passing -= 1;
        false
    }

    /// What the call returns that it hit.
    pub(super) const fn result(&self) -> i64 {
        -self.errno.cast_signed()
    }

    /// What [`failed`] is told.
    pub(super) fn answer(&self) -> i64 {
        self.failed.map_or(0, |number| number + 1)
    }
}

/// Keeps a call that begins from being made.
pub(super) fn skip(pid: libc::pid_t) {
    poke(pid, ORIG_RAX, -1);
}

/// Sets what a call that ends returns.
pub(super) fn set_result(pid: libc::pid_t, result: i64) {
    poke(pid, RAX, result);
}

/// Places in the kernel's `struct user`, whose registers come first.
///
/// Source: Linux `arch/x86/include/asm/user_64.h`.
const RAX: usize = 10 * 8;
const ORIG_RAX: usize = 15 * 8;

#[cfg(target_arch = "x86_64")]
fn poke(pid: libc::pid_t, place: usize, value: i64) {
    let place = ptr::without_provenance_mut::<c_void>(place);
    // SAFETY: the thread has stopped, and the place is one of its registers. That
    // it was killed meanwhile shows at the next wait.
    unsafe { libc::ptrace(libc::PTRACE_POKEUSER, pid, place, value) };
}

/// Elsewhere the control call stays refused, and so nothing is ever armed.
#[cfg(not(target_arch = "x86_64"))]
fn poke(_: libc::pid_t, _: usize, _: i64) {}

/// What libraries do for themselves, where a failure ends the process or is
/// asked for again for ever, and what cannot fail.
const UNCOUNTED: &[c_long] = &[
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The descriptor is closed all the same.
    libc::SYS_close,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_umask,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
];
