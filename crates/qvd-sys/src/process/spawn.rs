//! The parent's side: makes the child and hears from it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
};

use super::{
    child::{Child, READY},
    pidfd::Process,
    plan::{Namespaces, Op, Plan, lift},
    shared,
};
use crate::signals;

/// Why a child could not be made or did not get through its plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The child could not be made.
    #[error("cannot make the process")]
    Clone(#[source] io::Error),
    /// A step of the plan failed.
    #[error("cannot {name}")]
    Step {
        /// What the plan calls the step.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The child ended before its plan did, for instance by the OOM killer.
    #[error("the process was killed before its program ran")]
    Died,
    /// The child took too long.
    #[error("the process did not report within {0:?}")]
    Timeout(Duration),
    /// The socket to the child failed.
    #[error("cannot talk with the process")]
    Control(#[source] io::Error),
}

/// What a child reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It has come to [`Op::Ready`].
    Ready {
        /// System calls it has made since it was born.
        calls: u32,
    },
    /// It closed its end: it executed its program, or it ended.
    Closed,
}

/// A child that executes its plan. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Spawned {
    process: Process,
    control: OwnedFd,
    steps: Arc<Vec<(String, Op)>>,
}

/// Makes a child in new `namespaces` and, with `cgroup`, in that v2 cgroup,
/// and lets it execute `plan`.
///
/// In user and process namespaces of its own it shares our memory until it executes, unless
/// its plan changes how the kernel treats that; otherwise it has a copy. The flag
/// "dumpable" of this process is put back after each: whoever clears it does so before.
///
/// # Errors
/// [`SpawnError::Clone`]: no such namespaces, no processes left, or no privilege.
pub fn spawn(plan: Plan, namespaces: Namespaces, cgroup: Option<BorrowedFd<'_>>) -> Result<Spawned, SpawnError> {
    let shares = shared::may_share(&plan, namespaces);
    let unblocks = plan.has(|op| matches!(op, Op::UnblockSignals));
    let Plan { mut steps, fds, .. } = plan;
    // CLONE_CLEAR_SIGHAND leaves ignored signals ignored, through the exec too;
    // Rust programs ignore SIGPIPE.
    let ignored = (1..=SIGNALS).filter(|&signal| is_ignored(signal));
    steps.splice(0..0, ignored.map(|signal| (format!("reset signal {signal}"), Op::DefaultSignal(signal))));
    if shares && !unblocks {
        let mask = signals::blocked().map_err(SpawnError::Clone)?;
        steps.insert(0, ("take signals as before".to_owned(), Op::BlockSignals(mask)));
    }
    let steps = Arc::new(steps);

    let kind = SocketType::SEQPACKET;
    let (control, theirs) =
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).map_err(|e| SpawnError::Control(e.into()))?;
    let theirs = lift(theirs).map_err(SpawnError::Control)?;
    let mut kept: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).chain([theirs.as_raw_fd()]).collect();
    let gaps = gaps(&mut kept);

    // SAFETY: an all-zero clone_args is a valid value of a plain C struct.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces.0 | CLEAR_SIGHAND | libc::CLONE_PIDFD.cast_unsigned() as u64;
    args.exit_signal = libc::SIGCHLD.cast_unsigned().into();
    if let Some(cgroup) = cgroup {
        args.flags |= INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd().cast_unsigned().into();
    }
    let made = if shares {
        shared::clone(args, Arc::clone(&steps), gaps, theirs.as_raw_fd())
    } else {
        copy(args, &steps, &gaps, theirs.as_raw_fd())
    };
    let (pid, pidfd) = made.map_err(SpawnError::Clone)?;
    Ok(Spawned { process: Process::newborn(pid, pidfd), control, steps })
}

/// Makes a child with a copy of our memory.
fn copy(
    mut args: libc::clone_args,
    steps: &[(String, Op)],
    gaps: &[(u32, u32)],
    control: RawFd,
) -> io::Result<(u32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    args.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    // SAFETY: like fork: without CLONE_VM the child has a copy of everything.
    // It touches only what was prepared above, with raw system calls, and never
    // returns from `run`. The kernel stores the new descriptor into `pidfd`.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        Child::new(control, gaps).run(steps);
    }
    let Ok(pid) = u32::try_from(pid) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just opened it for us, and nobody else knows it.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Source: Linux `include/uapi/linux/sched.h`; libc types them as `c_int`,
/// which they overflow.
const CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// Source: Linux `include/uapi/asm-generic/signal.h`, `_NSIG`.
const SIGNALS: i32 = 64;

fn is_ignored(signal: i32) -> bool {
    // SAFETY: an all-zero sigaction is valid; a null new action only asks. The
    // C library refuses its own two signals, which are never ignored.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}

/// What lies between the descriptors to keep, to close it in few calls.
fn gaps(kept: &mut [RawFd]) -> Vec<(u32, u32)> {
    kept.sort_unstable();
    let mut next = 0;
    let mut gaps = Vec::with_capacity(kept.len() + 1);
    for fd in kept.iter().map(|fd| fd.cast_unsigned()) {
        if next < fd {
            gaps.push((next, fd - 1));
        }
        next = fd + 1;
    }
    gaps.push((next, u32::MAX));
    gaps
}

impl Spawned {
    /// The process.
    #[must_use]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// The process, to wait for it.
    pub const fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Lets the child pass its next [`Op::Wait`].
    ///
    /// # Errors
    /// The child has ended; [`Spawned::event`] says why.
    pub fn release(&self) -> Result<(), SpawnError> {
        match send(&self.control, &[1], SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(error) => Err(SpawnError::Control(error.into())),
        }
    }

    /// Waits for the child's next report.
    ///
    /// # Errors
    /// A step failed, or nothing came within `limit`.
    pub fn event(&self, limit: Duration) -> Result<Event, SpawnError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| SpawnError::Timeout(limit))?;
            match poll(&mut [PollFd::new(&self.control, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Err(SpawnError::Timeout(limit)),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(SpawnError::Control(error.into())),
            }
        }
        let mut record = [0_u8; 8];
        // A child that ended without reading what we sent makes one call fail;
        // what it said before is still there to read.
        let mut received = recv(&self.control, &mut record, RecvFlags::empty());
        while matches!(received, Err(Errno::CONNRESET | Errno::INTR)) {
            received = recv(&self.control, &mut record, RecvFlags::empty());
        }
        match received {
            Ok((8, _)) => self.parse(record),
            Ok(_) => Ok(Event::Closed),
            Err(error) => Err(SpawnError::Control(error.into())),
        }
    }

    fn parse(&self, record: [u8; 8]) -> Result<Event, SpawnError> {
        let [a, b, c, d, e, f, g, h] = record;
        let (step, error) = (u32::from_ne_bytes([a, b, c, d]), i32::from_ne_bytes([e, f, g, h]));
        if step == READY {
            return Ok(Event::Ready { calls: error.cast_unsigned() });
        }
        let name = usize::try_from(step).ok().and_then(|step| self.steps.get(step));
        let name = name.map_or_else(|| "prepare the process".to_owned(), |(name, _)| name.clone());
        Err(SpawnError::Step { name, source: io::Error::from_raw_os_error(error) })
    }

    /// Gives up the channel and keeps the process, which is on its own now.
    #[must_use]
    pub fn into_process(mut self) -> Process {
        self.process.grow_up();
        self.process
    }
}

impl AsFd for Spawned {
    /// Becomes readable when [`Spawned::event`] has something to say.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}
