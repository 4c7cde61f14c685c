//! A child that shares its parent's memory until it executes its program, so that
//! making it costs the same however much memory the parent has.
//!
//! A copying clone copies the page tables of all that the parent has touched and
//! write-protects them, so that the parent's next writes fault one page at a time.
//! With `CLONE_VM | CLONE_VFORK` nothing is copied. What that asks for:
//!
//! - The thread that makes the child sleeps until the child executes or ends, and the
//!   child uses its stack and its thread-local `errno` meanwhile. So that the caller
//!   can go on and answer the child, the clone is made by a thread of its own.
//! - Without `CLONE_VFORK` the child would share more than memory: the OOM killer kills
//!   all processes that share memory with its victim, but never chooses a child that
//!   somebody waits for like this, and `oom_score_adj` is written to all that
//!   share memory but for those (Linux `mm/oom_kill.c`, `oom_badness`; `fs/proc/base.c`,
//!   `__set_oom_adj`).
//! - What the kernel keeps for a memory and not for a process is the parent's. A plan
//!   that changes that gets a copy ([`Plan::keeps_memory`]); the flag "dumpable", which
//!   the kernel clears when the child becomes another user, is put back ([`Dumpable`]).
//! - Whoever may trace the child could write in the parent's memory. So only a child in
//!   new user and process namespaces shares: until it executes, nobody else is in
//!   them, and nobody outside of them but root of the host may trace it.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    thread,
};

use rustix::thread::futex;

use super::{
    child::Child,
    plan::{Namespaces, Op, Plan},
};
use crate::signals::BlockedSignals;

#[cfg(test)]
mod tests;

/// Stack of the thread that makes the child, which the child uses too. A walk through a plan
/// takes a few KiB without optimization; only what is touched takes memory.
const STACK_BYTES: usize = 256 * 1024;

/// Source: Linux `include/uapi/linux/prctl.h`; `SUID_DUMP_ROOT` of `include/linux/sched/coredump.h`,
/// which only the kernel can set.
const DUMPABLE_FOR_ROOT: i32 = 2;

impl Plan {
    /// Whether a child that shares our memory could execute this plan and leave that
    /// memory's own settings alone.
    fn keeps_memory(&self) -> bool {
        !self.has(|op| match op {
            Op::OfferMemory | Op::SmallPages => true,
            // The kernel refuses that to processes that share memory.
            Op::Unshare(namespaces) => namespaces.has(Namespaces::USER),
            _ => false,
        })
    }
}

/// Whether a child in these new namespaces, with this plan, may share our memory.
pub(super) fn may_share(plan: &Plan, namespaces: Namespaces) -> bool {
    let alone = namespaces.has(Namespaces::USER) && namespaces.has(Namespaces::PID);
    cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) && alone && plan.keeps_memory()
}

/// What becomes of the attempt to make a child. The kernel writes `pid` and `pidfd` before the
/// child runs; whoever has seen `state` change sees them too.
#[derive(Debug, Default)]
struct Birth {
    state: AtomicU32,
    pid: AtomicI32,
    pidfd: AtomicI32,
    /// Number of the error if there is no child.
    error: AtomicI32,
}

/// Values of `state` beside zero, which is none of them yet.
const BORN: u32 = 1;
const FAILED: u32 = 2;

impl Birth {
    fn tell(&self, state: u32) {
        self.state.store(state, Ordering::Release);
        let _woken = futex::wake(&self.state, futex::Flags::PRIVATE, 1);
    }

    fn wait(&self) -> io::Result<(u32, OwnedFd)> {
        loop {
            match self.state.load(Ordering::Acquire) {
                0 => drop(futex::wait(&self.state, futex::Flags::PRIVATE, 0, None)),
                BORN => break,
                _ => return Err(io::Error::from_raw_os_error(self.error.load(Ordering::Relaxed))),
            }
        }
        let pid = self.pid.load(Ordering::Relaxed).cast_unsigned();
        // SAFETY: the kernel has just opened it for us; nobody else reads it here, and we
        // do so once.
        Ok((pid, unsafe { OwnedFd::from_raw_fd(self.pidfd.load(Ordering::Relaxed)) }))
    }
}

/// What the child is given.
struct Given<'a> {
    steps: &'a [(String, Op)],
    gaps: &'a [(u32, u32)],
    control: RawFd,
    birth: &'a Birth,
}

/// The child's first function. It begins on the stack of the thread that made it, below all
/// that this thread uses.
extern "C" fn begin(given: &Given<'_>) -> ! {
    let child = Child::new(given.control, given.gaps);
    child.wake(&given.birth.state, BORN);
    child.run(given.steps)
}

/// Makes a child that shares our memory, and returns once it exists. The
/// descriptors that `args`, `steps` and `control` name have to be open until then.
pub(super) fn clone(
    mut args: libc::clone_args,
    steps: Arc<Vec<(String, Op)>>,
    gaps: Vec<(u32, u32)>,
    control: RawFd,
) -> io::Result<(u32, OwnedFd)> {
    let birth = Arc::new(Birth::default());
    let theirs = Arc::clone(&birth);
    let dumpable = Dumpable::keep()?;
    // Not waited for: it ends when the child has executed or is gone, which the
    // owner of the child sees to.
    let maker = thread::Builder::new().name("spawn".to_owned()).stack_size(STACK_BYTES);
    maker.spawn(move || {
        let birth = theirs;
        let given = Given { steps: &steps, gaps: &gaps, control, birth: &birth };
        args.flags |= (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID).cast_unsigned() as u64;
        args.pidfd = birth.pidfd.as_ptr().expose_provenance() as u64;
        args.parent_tid = birth.pid.as_ptr().expose_provenance() as u64;
        // No handler of ours may run in the child, nor on this thread, whose signals
        // would wait for the child: they are for other threads.
        let made = BlockedSignals::all().map(|_blocked| {
            // SAFETY: `args` names places in `birth` alone, and what else it names is
            // open. While the child runs, this thread sleeps in the call: what it borrows
            // stays, and its stack and thread-locals are the child's.
            unsafe { clone3(&args, &given) }
        });
        drop(dumpable);
        match made {
            // The child says so itself, if it came to that.
            Ok(0..) => birth.tell(BORN),
            Ok(error) => {
                birth.error.store(i32::try_from(-error).unwrap_or(libc::EIO), Ordering::Relaxed);
                birth.tell(FAILED);
            }
            Err(error) => {
                birth.error.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Relaxed);
                birth.tell(FAILED);
            }
        }
    })?;
    birth.wait()
}

/// Makes a child by these `args`, which share memory and have this thread wait, and has it
/// call [`begin`]. Returns in this thread alone: the child's number, or less than
/// zero the error's.
///
/// By hand, since the child comes back on the stack that this thread goes on with: if it
/// returned from any function, such as the C library's `syscall`, this thread would find
/// another return address there. It calls from here instead, and that never returns.
///
/// # Safety
/// What `args` name is valid, and they have both `CLONE_VM` and `CLONE_VFORK`. Signals
/// are blocked: no handler may run in the child.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(args: &libc::clone_args, given: &Given<'_>) -> i64 {
    let result;
    // SAFETY: registers are as the kernel's calling convention has them, which changes
    // `rax`, `rcx` and `r11`. Without `nostack` the stack is aligned for a call, and
    // nothing of ours lies below its pointer, so what the child puts there harms nobody.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, {given}",
            "call {begin}",
            "ud2",
            "2:",
            begin = sym begin,
            given = in(reg) given,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<libc::clone_args>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
unsafe fn clone3(args: &libc::clone_args, given: &Given<'_>) -> i64 {
    let result;
    // SAFETY: as above; the call changes `x0` alone.
    unsafe {
        std::arch::asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x0, {given}",
            "bl {begin}",
            "brk 1",
            "2:",
            begin = sym begin,
            given = in(reg) given,
            in("x8") libc::SYS_clone3,
            inlateout("x0") args => result,
            in("x1") size_of::<libc::clone_args>(),
        );
    }
    result
}

/// Elsewhere [`may_share`] says no.
///
/// # Safety
/// As above.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn clone3(_: &libc::clone_args, _: &Given<'_>) -> i64 {
    -i64::from(libc::ENOSYS)
}

/// Children that share our memory, and the flag as it was before the first of them.
struct Sharing {
    children: usize,
    dumpable: i32,
}

static SHARING: Mutex<Sharing> = Mutex::new(Sharing { children: 0, dumpable: 0 });

/// A child that shares our memory, as far as the flag "dumpable" of that memory is concerned: dropped,
/// the last of them puts it back.
///
/// A child that becomes another user makes the kernel clear the flag (Linux
/// `kernel/cred.c`, `commit_creds`): the memory can be dumped and traced by root of the host
/// alone until then. That is as it should be while anybody shares it, so it is never
/// put back earlier.
#[derive(Debug)]
struct Dumpable;

impl Dumpable {
    fn keep() -> io::Result<Self> {
        let mut sharing = SHARING.lock().unwrap_or_else(PoisonError::into_inner);
        if sharing.children == 0 {
            sharing.dumpable = dumpable()?;
        }
        sharing.children += 1;
        Ok(Self)
    }
}

impl Drop for Dumpable {
    fn drop(&mut self) {
        let mut sharing = SHARING.lock().unwrap_or_else(PoisonError::into_inner);
        sharing.children -= 1;
        if sharing.children > 0 || dumpable().is_ok_and(|now| now == sharing.dumpable) {
            return;
        }
        // What only the kernel can set becomes what is stricter.
        let before = if sharing.dumpable == DUMPABLE_FOR_ROOT { 0 } else { sharing.dumpable };
        // SAFETY: takes numbers. It has no way to fail: the value is zero or one.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, libc::c_long::from(before), 0, 0, 0) };
    }
}

/// Whether this process may be dumped and traced: no, yes, or by root alone.
fn dumpable() -> io::Result<i32> {
    // SAFETY: takes and returns numbers.
    match unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) } {
        flag @ 0.. => Ok(flag),
        _ => Err(io::Error::last_os_error()),
    }
}
