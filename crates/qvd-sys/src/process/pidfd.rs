//! Processes by descriptor: no number is ever signalled or waited for that
//! could have come to mean another process.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It ended; how is known only to whoever reaped it. Happens for a process
    /// that is not our child on a kernel before 6.15.
    Unknown,
}

impl Exit {
    fn from_wait_status(status: i32) -> Self {
        if libc::WIFEXITED(status) {
            Self::Code(libc::WEXITSTATUS(status))
        } else {
            Self::Signal(libc::WTERMSIG(status))
        }
    }
}

/// A process that we may watch, signal and, if it is our child, reap.
/// Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    exit: Option<Exit>,
    /// Whether nobody but us knows of it yet, so that it goes with this value.
    newborn: bool,
}

/// How long the kernel may take to end a process that was killed.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

impl Process {
    pub(super) const fn new(pid: u32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, exit: None, newborn: false }
    }

    pub(super) const fn newborn(pid: u32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, exit: None, newborn: true }
    }

    pub(super) const fn grow_up(&mut self) {
        self.newborn = false;
    }

    /// Opens the process that has the number `pid` at this moment.
    ///
    /// # Errors
    /// `ESRCH`: there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self::new(pid, pidfd_open(number, PidfdFlags::empty())?))
    }

    /// Its number. Means this process only while [`Process::try_wait`] says
    /// that it has not been reaped.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal; `Ok` when it has ended already.
    ///
    /// # Errors
    /// `EPERM`: we may not.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the first process of a container to halt it, by the signal that systemd
    /// and others take for that; `Ok` when it has ended already.
    ///
    /// # Errors
    /// `EPERM`: we may not.
    pub fn halt(&self) -> io::Result<()> {
        // Source: systemd(1), SIGRTMIN+3. By number, as it has no name of its own.
        let signal = libc::SIGRTMIN() + 3;
        // SAFETY: without siginfo all arguments are numbers.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match io::Error::last_os_error() {
            error if sent < 0 && error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(()),
        }
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The kernel refuses to say.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        self.wait(Duration::ZERO)
    }

    /// Waits until it has ended, at most for `limit`, and reaps it if it is
    /// our child. `None`: it still runs.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<Exit>> {
        if self.exit.is_none() && self.poll(PollFlags::IN, limit)? {
            self.exit = Some(self.reap()?);
        }
        Ok(self.exit)
    }

    fn poll(&self, wanted: PollFlags, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::new(&self.pidfd, wanted)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(fds.iter().any(|fd| fd.revents().intersects(wanted))),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn reap(&self) -> io::Result<Exit> {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    let code = status.exit_status().map(Exit::Code);
                    return Ok(code.or_else(|| status.terminating_signal().map(Exit::Signal)).unwrap_or(Exit::Unknown));
                }
                Ok(None) => return Ok(Exit::Unknown),
                Err(Errno::INTR) => {}
                Err(Errno::CHILD) => return self.foreign_exit(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The exit status of a process that somebody else reaps. The kernel tells
    /// it once that has happened, which the descriptor shows by hanging up.
    fn foreign_exit(&self) -> io::Result<Exit> {
        /// Reaping follows an exit within microseconds, or never.
        const REAPED_WITHIN: Duration = Duration::from_millis(200);
        if !self.poll(PollFlags::HUP, REAPED_WITHIN)? {
            return Ok(Exit::Unknown);
        }
        // SAFETY: an all-zero pidfd_info is a valid value of a plain C struct.
        let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
        info.mask = u64::from(libc::PIDFD_INFO_EXIT);
        // SAFETY: PIDFD_GET_INFO reads and writes one `pidfd_info`.
        let result = unsafe { libc::ioctl(self.pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
        let told = result == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0;
        Ok(if told { Exit::from_wait_status(info.exit_code) } else { Exit::Unknown })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.newborn {
            // A child that has ended stays a zombie until it is waited for.
            let _gone = self.signal(Signal::KILL).and_then(|()| self.wait(KILLED_WITHIN));
        }
    }
}

impl AsFd for Process {
    /// Becomes readable when the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// When a process was started, in clock ticks since the boot. Together with
/// the boot and the number it names one process for ever.
///
/// # Errors
/// There is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let [start] = stat(pid, [22])?;
    Ok(start)
}

/// Processor time that a process has used in all its threads; none if there is
/// no such process.
///
/// # Errors
/// `/proc` cannot be read.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    match stat(pid, [14, 15]) {
        Ok([user, system]) => {
            let per_second = rustix::param::clock_ticks_per_second().max(1);
            Ok(Duration::from_millis((user + system).saturating_mul(1000) / per_second))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {
            Ok(Duration::ZERO)
        }
        Err(error) => Err(error),
    }
}

/// Numbers from `/proc/PID/stat`, by their position in proc(5).
fn stat<const N: usize>(pid: u32, fields: [usize; N]) -> io::Result<[u64; N]> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may contain anything; field 3 is the first behind it.
    let rest: Vec<_> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let mut numbers = [0; N];
    for (number, field) in numbers.iter_mut().zip(fields) {
        let text = field.checked_sub(3).and_then(|index| rest.get(index));
        *number = text.and_then(|text| text.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    }
    Ok(numbers)
}

/// The random name of this boot of the kernel.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
// Children are waited for through the type under test.
#[allow(clippy::unwrap_used, clippy::zombie_processes)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn exit_status_and_signal_arrive() {
        let mut child = Command::new("sh").args(["-c", "read _; exit 7"]).stdin(Stdio::piped()).spawn().unwrap();
        let mut process = Process::open(child.id()).unwrap();
        assert_eq!(process.try_wait().unwrap(), None);
        drop(child.stdin.take());
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap(), Some(Exit::Code(7)));
        assert_eq!(process.try_wait().unwrap(), Some(Exit::Code(7)), "asking again");

        let child = Command::new("sh").args(["-c", "read _"]).stdin(Stdio::piped()).spawn().unwrap();
        let mut process = Process::open(child.id()).unwrap();
        process.signal(Signal::KILL).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap(), Some(Exit::Signal(9)));
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn the_end_of_a_process_that_is_not_our_child_is_seen() {
        let orphan = Command::new("sh").args(["-c", "sleep 60 >/dev/null 2>&1 & echo $!"]).output().unwrap();
        let pid = String::from_utf8(orphan.stdout).unwrap().trim().parse().unwrap();
        let mut process = Process::open(pid).unwrap();
        assert_eq!(process.try_wait().unwrap(), None);
        process.signal(Signal::KILL).unwrap();
        let exit = process.wait(Duration::from_secs(10)).unwrap().unwrap();
        // How it ended is known from Linux 6.15 on, once its new parent has reaped it.
        assert!(matches!(exit, Exit::Signal(9) | Exit::Unknown), "{exit:?}");
    }

    #[test]
    fn the_start_time_of_a_process_is_its_own() {
        let me = start_time(std::process::id()).unwrap();
        assert_eq!(me, start_time(std::process::id()).unwrap());
        assert!(start_time(1).unwrap() <= me);
    }
}
