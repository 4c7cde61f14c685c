//! Children that are killed after a given system call, or in which a given one
//! fails: what a crash or a failure leaves behind at each point of an operation
//! is found by making it happen there.

mod fault;

use std::{
    collections::{HashMap, HashSet},
    ffi::{c_int, c_long, c_void},
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr, thread,
    time::Duration,
};

use fault::Fault;
pub use fault::{fail_after, fail_after_in, failed};

/// Which system calls of a child are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// All of them.
    Every,
    /// Those that can leave something behind: between two of these, a crash is
    /// the same wherever it happens.
    Lasting,
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With what its function returned; 101 if that panicked.
    Returned(u8),
    /// Killed after the call that it was to be killed after, whose number this is.
    Killed(c_long),
    /// By a signal: `SIGALRM` when it took too long.
    Signal(i32),
}

/// What became of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traced {
    /// How it ended.
    pub end: End,
    /// How many calls were counted until then.
    pub calls: u32,
}

/// Runs `f` in a child of this process and kills that, with all its threads
/// and children, once it has made `kill_after` of the system calls that are
/// counted. Threads of the child count too; processes that it starts do not.
///
/// For tests: the child is a copy of this process by `fork`, with one thread. `f`
/// borrows nothing, since in the child the C library gives the memory of the other
/// threads' stacks to new ones. If another thread
/// of this process holds a lock just then that `f` takes, such as that of the
/// standard output, the child waits for it in vain until `limit` has passed.
///
/// # Errors
/// The child cannot be made or traced.
pub fn run(
    kill_after: Option<u32>,
    counted: Counted,
    limit: Duration,
    f: impl FnOnce() -> u8 + Send + 'static,
) -> io::Result<Traced> {
    // A thread of its own: what it waits for are its own children and never
    // those of somebody else in this process.
    let tracer = thread::Builder::new().name("tracer".to_owned()).spawn(move || {
        // SAFETY: the C library makes its allocator usable in the child;
        // other locks are the caller's care, as the documentation says. The
        // child leaves by `_exit` alone and never returns to this stack.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => child(limit, f),
            pid => {
                let (current, failing, followed) = (HashMap::new(), HashSet::new(), HashMap::new());
                let tracer = Tracer {
                    child: pid,
                    kill_after,
                    counted,
                    calls: 0,
                    current,
                    killed: None,
                    fault: None,
                    followed,
                    interrupted: HashSet::new(),
                    failing,
                    ended: false,
                };
                tracer.run()
            }
        }
    })?;
    tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn child(limit: Duration, f: impl FnOnce() -> u8) -> ! {
    let seconds = u32::try_from(limit.as_secs().max(1)).unwrap_or(u32::MAX);
    // SAFETY: all three take plain numbers. The alarm ends a child that hangs,
    // and the stop lets the parent begin to count.
    unsafe {
        libc::alarm(seconds);
        libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<c_void>(), ptr::null_mut::<c_void>());
        libc::raise(libc::SIGSTOP);
    }
    let code = catch_unwind(AssertUnwindSafe(f)).unwrap_or(101);
    // SAFETY: ends the process without running what the parent registered.
    unsafe { libc::_exit(code.into()) }
}

/// `struct ptrace_syscall_info`, as far as the stop at a call's entry needs it.
/// Source: Linux `include/uapi/linux/ptrace.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CallInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    instruction: u64,
    stack: u64,
    number: u64,
    arguments: [u64; 6],
}

const GET_SYSCALL_INFO: c_int = 0x420e;
const OP_ENTRY: u8 = 1;
const OP_EXIT: u8 = 2;

struct Tracer {
    child: libc::pid_t,
    kill_after: Option<u32>,
    counted: Counted,
    calls: u32,
    /// The call that each traced thread is in; `None` for processes that the
    /// child started, which are only kept so that they can be killed.
    current: HashMap<libc::pid_t, Option<CallInfo>>,
    killed: Option<c_long>,
    /// What the child asked for.
    fault: Option<Fault>,
    /// The process whose calls are to fail, if it is one, and what it has started,
    /// each with how many programs it may execute and still counts.
    followed: HashMap<libc::pid_t, u32>,
    /// Processes that were stopped so that their calls can be followed.
    interrupted: HashSet<libc::pid_t>,
    /// Threads that are in the call that is to fail.
    failing: HashSet<libc::pid_t>,
    /// Whether everything was killed: what shows from then on is killed too.
    ended: bool,
}

impl Tracer {
    fn run(mut self) -> io::Result<Traced> {
        let mut end = End::Returned(0);
        let mut first = true;
        loop {
            let mut status = 0;
            // SAFETY: the status is a valid place; only children and tracees of
            // this thread are waited for.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
            if pid < 0 {
                match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EINTR) => continue,
                    error if error.raw_os_error() == Some(libc::ECHILD) => break,
                    error => return Err(error),
                }
            }
            if libc::WIFSTOPPED(status) {
                if std::mem::take(&mut first) {
                    self.begin()?;
                }
                if self.ended {
                    // Born just before the others were killed, and heard of only now.
                    kill(pid);
                } else {
                    self.stopped(pid, status)?;
                }
            } else {
                self.current.remove(&pid);
                if pid == self.child {
                    end = match self.killed {
                        Some(call) => End::Killed(call),
                        None if libc::WIFSIGNALED(status) => End::Signal(libc::WTERMSIG(status)),
                        None => End::Returned(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX)),
                    };
                    // Nothing that it started goes on without it.
                    self.kill_all();
                }
            }
        }
        Ok(Traced { end, calls: self.calls })
    }

    fn begin(&mut self) -> io::Result<()> {
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACEEXEC
            | libc::PTRACE_O_EXITKILL;
        self.current.insert(self.child, Some(CallInfo::default()));
        // SAFETY: the child has stopped; options are a number.
        match unsafe {
            libc::ptrace(libc::PTRACE_SETOPTIONS, self.child, ptr::null_mut::<c_void>(), c_long::from(options))
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn stopped(&mut self, pid: libc::pid_t, status: c_int) -> io::Result<()> {
        let known = self.current.contains_key(&pid);
        if !known {
            let parent = status_field(pid, "PPid:").filter(|parent| self.followed.contains_key(parent));
            if parent.is_some() {
                self.followed.insert(pid, 1);
            }
            let ours = match &self.fault {
                Some(fault) => fault.of().is_none() || parent.is_some(),
                None => status_field(pid, "Tgid:") == Some(self.child),
            };
            self.current.insert(pid, ours.then(CallInfo::default));
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        if event == libc::PTRACE_EVENT_EXEC && pid != self.child {
            match self.followed.get_mut(&pid) {
                Some(programs @ 1..) => *programs -= 1,
                // What a program does is no business of who started it.
                _ => drop(self.current.insert(pid, None)),
            }
        }
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            self.call(pid)?;
        } else if event == 0 && signal == libc::SIGSTOP && self.interrupted.remove(&pid) {
            // It was ours, see `follow`.
        } else if event == 0 && (known || signal != libc::SIGSTOP) && (signal != libc::SIGSTOP || pid != self.child) {
            deliver = signal;
        }
        let request = match self.current.get(&pid) {
            Some(Some(_)) => libc::PTRACE_SYSCALL,
            _ => libc::PTRACE_CONT,
        };
        // SAFETY: the thread has stopped. That it was killed meanwhile shows at
        // the next wait.
        unsafe { libc::ptrace(request, pid, ptr::null_mut::<c_void>(), c_long::from(deliver)) };
        Ok(())
    }

    /// A thread enters or leaves a system call.
    fn call(&mut self, pid: libc::pid_t) -> io::Result<()> {
        let mut info = CallInfo::default();
        // SAFETY: the kernel writes at most the stated size.
        let got = unsafe { libc::ptrace(GET_SYSCALL_INFO as _, pid, size_of::<CallInfo>(), &raw mut info) };
        if got < 0 {
            let error = io::Error::last_os_error();
            // It was killed while it stood there.
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) };
        }
        let Some(Some(current)) = self.current.get_mut(&pid) else { return Ok(()) };
        if info.op == OP_ENTRY {
            *current = info;
            let followed = self.followed.contains_key(&pid);
            if Fault::asked(info.number, &info.arguments).is_none()
                && let Some(fault) = &mut self.fault
                && fault.of().is_some() == followed
                && fault.hits(info.number, &info.arguments)
            {
                self.failing.insert(pid);
                fault::skip(pid);
            }
        } else if info.op == OP_EXIT
            && let Some(asked) = Fault::asked(current.number, &current.arguments)
        {
            let answer = self.fault.as_ref().map_or(0, Fault::answer);
            self.fault = asked;
            self.follow();
            fault::set_result(pid, if self.fault.is_some() { 0 } else { answer });
        } else if info.op == OP_EXIT && self.failing.remove(&pid) {
            fault::set_result(pid, self.fault.as_ref().map_or(0, Fault::result));
        } else if info.op == OP_EXIT && (self.counted == Counted::Every || current.lasting()) {
            self.calls = self.calls.saturating_add(1);
            if self.kill_after == Some(self.calls) {
                self.killed = Some(current.number.cast_signed());
                self.kill_all();
            }
        }
        Ok(())
    }

    /// Follows the calls of the process that the fault is of, and no others any
    /// more. It runs meanwhile, so it is stopped once.
    fn follow(&mut self) {
        for (pid, _) in self.followed.drain() {
            if let Some(current) = self.current.get_mut(&pid) {
                *current = None;
            }
        }
        let Some(pid) = self.fault.as_ref().and_then(Fault::of) else { return };
        if let Some(current) = self.current.get_mut(&pid) {
            *current = Some(CallInfo::default());
            self.followed.insert(pid, 0);
            self.interrupted.insert(pid);
            // SAFETY: it is traced, so its number is its own.
            unsafe { libc::kill(pid, libc::SIGSTOP) };
        }
    }

    fn kill_all(&mut self) {
        self.ended = true;
        self.current.keys().chain([&self.child]).copied().for_each(kill);
    }
}

/// Kills a thread that is traced, and its process.
fn kill(pid: libc::pid_t) {
    // SAFETY: it is traced, so its number is its own; one that has ended is not
    // there, which is what was wanted.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// A number that the kernel tells of a thread: its process, or whose child that is.
fn status_field(thread: libc::pid_t, name: &str) -> Option<libc::pid_t> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// Calls that leave nothing behind when their process dies right after.
const PASSING: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_flock,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
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
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_getegid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_prlimit64,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_clone3,
    libc::SYS_clone,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_pidfd_open,
    libc::SYS_kill,
    libc::SYS_tgkill,
];

/// Calls that only old architectures have.
#[cfg(target_arch = "x86_64")]
const PASSING_OLD: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const PASSING_OLD: &[c_long] = &[];

impl CallInfo {
    /// Whether the call can have changed what stays after a crash. What is not
    /// known counts.
    fn lasting(&self) -> bool {
        let number = self.number.cast_signed();
        if number == libc::SYS_openat {
            let creating = libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);
            let [_, _, flags, ..] = self.arguments;
            return flags & u64::from(creating.cast_unsigned()) != 0;
        }
        if number == libc::SYS_openat2 {
            // Its flags are in memory. In this project it opens what is there.
            return false;
        }
        !PASSING.contains(&number) && !PASSING_OLD.contains(&number)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_child_is_killed_after_each_call_that_lasts() {
        let dir = std::env::temp_dir().join(format!("qvd-traced-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let names = ["a", "b", "c"];
        let at = dir.clone();
        let work = move || {
            thread::scope(|scope| {
                // What a thread does counts like the rest.
                scope.spawn(|| fs::create_dir(at.join(names[0])).unwrap());
            });
            fs::read_dir(&at).unwrap().for_each(drop);
            // What another process does, does not.
            assert!(Command::new("true").status().unwrap().success());
            fs::create_dir(at.join(names[1])).unwrap();
            fs::create_dir(at.join(names[2])).unwrap();
            7
        };
        let clean = || names.iter().filter(|name| fs::remove_dir(dir.join(name)).is_ok()).count();
        let whole = run(None, Counted::Lasting, LIMIT, work.clone()).unwrap();
        assert_eq!(whole.end, End::Returned(7));
        assert_eq!(clean(), 3);
        let mut made = Vec::new();
        for after in 1..=whole.calls {
            let killed = run(Some(after), Counted::Lasting, LIMIT, work.clone()).unwrap();
            assert!(matches!(killed.end, End::Killed(_)), "{killed:?}");
            assert_eq!(killed.calls, after);
            made.push(clean());
        }
        assert!(made.is_sorted(), "{made:?}");
        made.dedup();
        assert!(made.ends_with(&[1, 2, 3]), "{made:?}");
        assert!(run(None, Counted::Every, LIMIT, work).unwrap().calls > whole.calls);
        clean();
        fs::remove_dir(dir).unwrap();
    }

    #[test]
    fn what_was_born_just_before_the_end_does_not_outlive_it() {
        let dir = std::env::temp_dir().join(format!("qvd-traced-born-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let at = dir.clone();
        let work = move || {
            for number in 0..8 {
                // SAFETY: the child makes no use of what other threads hold.
                if unsafe { libc::fork() } == 0 {
                    // Outlives everything unless it is killed, and then shows.
                    thread::sleep(Duration::from_secs(1));
                    fs::write(at.join(number.to_string()), "").unwrap();
                    // SAFETY: ends the process and nothing else.
                    unsafe { libc::_exit(0) };
                }
            }
            0
        };
        let calls = run(None, Counted::Every, LIMIT, work.clone()).unwrap().calls;
        for after in (1..=calls).cycle().take(200) {
            run(Some(after), Counted::Every, LIMIT, work.clone()).unwrap();
            let outlived = fs::read_dir(&dir).unwrap().count();
            assert_eq!(outlived, 0, "after call {after} of {calls}");
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_call_that_is_asked_for_fails_and_no_other() {
        let work = || {
            let read = || fs::read_link("/proc/self/exe").map(drop).map_err(|error| error.raw_os_error());
            fail_after(0, libc::EIO).unwrap();
            assert_eq!(read(), Err(Some(libc::EIO)));
            assert_eq!(read(), Ok(()));
            assert_eq!(failed().unwrap(), Some(libc::SYS_readlink));
            fail_after(1, libc::ENOSPC).unwrap();
            assert_eq!((read(), read(), read()), (Ok(()), Err(Some(libc::ENOSPC)), Ok(())));
            fail_after(9, libc::EIO).unwrap();
            assert_eq!(read(), Ok(()));
            assert_eq!(failed().unwrap(), None);
            0
        };
        assert_eq!(run(None, Counted::Every, LIMIT, work).unwrap().end, End::Returned(0));
        assert_eq!(fail_after(0, libc::EIO).unwrap_err().raw_os_error(), Some(libc::EINVAL), "nobody traces");
    }

    #[test]
    fn a_child_that_hangs_or_panics_is_told_apart() {
        let hangs = run(None, Counted::Every, Duration::from_secs(1), || {
            loop {
                thread::park()
            }
        })
        .unwrap();
        assert_eq!(hangs.end, End::Signal(libc::SIGALRM));
        let panics = run(None, Counted::Every, LIMIT, || panic!("as it should")).unwrap();
        assert_eq!(panics.end, End::Returned(101));
    }
}
