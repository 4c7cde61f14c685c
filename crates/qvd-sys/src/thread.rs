//! A thread that gives up what it needs no more, while others of its process
//! keep theirs.

use std::io;

use libc::{c_long, sock_filter, sock_fprog};

/// Codes of the instructions used here. Source: Linux
/// `include/uapi/linux/bpf_common.h`: load a word, jump if equal, return.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Where the number of the call is. Source: Linux `include/uapi/linux/seccomp.h`, `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
/// And the kind of call. Source: as above.
const KIND_AT: u32 = 4;

/// This machine's kind of call. Source: Linux `include/uapi/linux/audit.h`.
#[cfg(target_arch = "x86_64")]
const KIND: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const KIND: u32 = 0xc000_00b7;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// What any thread of Rust's needs to wait, to allocate and to end.
const USUAL: &[c_long] = &[
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    // Its log.
    libc::SYS_write,
    libc::SYS_writev,
];

/// What a thread that talks over open sockets needs beside that.
const OVER_SOCKETS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];

/// From now on, and for good, the calling thread has no capabilities and makes no
/// calls but those for waiting, memory and sockets that are open: all others
/// fail with "operation not permitted".
///
/// # Errors
/// The kernel refused; the thread may have given up part of it.
pub fn confine_to_sockets() -> io::Result<()> {
    drop_capabilities()?;
    // SAFETY: no pointers are passed.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let allowed: Vec<c_long> = [USUAL, OVER_SOCKETS].concat();
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let mut filter = vec![
        instruction(LOAD, 0, 0, KIND_AT),
        instruction(JUMP_IF_EQUAL, 1, 0, KIND),
        instruction(RETURN, 0, 0, refuse),
        instruction(LOAD, 0, 0, NUMBER_AT),
    ];
    for number in allowed {
        let number = u32::try_from(number).map_err(io::Error::other)?;
        filter.push(instruction(JUMP_IF_EQUAL, 0, 1, number));
        filter.push(instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    filter.push(instruction(RETURN, 0, 0, refuse));
    let len = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: `program` and what it points to outlive the call, which reads them.
    let loaded = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if loaded == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// From now on the calling thread takes no processor away from one that runs: what
/// it does can wait, but is done even where others never rest.
///
/// # Errors
/// The kernel refused.
pub fn work_in_background() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `parameters`, which outlives it. By number, since a C
    // library may take it for one about the whole process.
    let set = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_BATCH, &raw const parameters) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn drop_capabilities() -> io::Result<()> {
    /// Source: Linux `include/uapi/linux/capability.h`, `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    // Version and thread, the calling one; then three sets in two halves.
    let (header, none) = ([VERSION, 0], [0_u32; 6]);
    // SAFETY: both are as long as version 3 has them and outlive the call.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_in_the_background_is_alone_in_that() {
        // SAFETY: no pointers are passed.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = policy();
        let there = std::thread::spawn(move || {
            work_in_background().unwrap();
            policy()
        });
        assert_eq!((there.join().unwrap(), policy()), (libc::SCHED_BATCH, before));
    }

    #[test]
    fn a_confined_thread_waits_and_allocates_and_opens_nothing() {
        let opened = std::thread::spawn(|| {
            confine_to_sockets().unwrap();
            let memory = vec![1_u8; 1 << 20];
            (std::fs::File::open("/proc/self/status").map(drop).unwrap_err().raw_os_error(), memory.len())
        });
        assert_eq!(opened.join().unwrap(), (Some(libc::EPERM), 1 << 20));
        // The others keep what they have.
        std::fs::File::open("/proc/self/status").unwrap();
    }
}
