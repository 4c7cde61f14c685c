//! Who ended, and how: the init is the parent of every orphan inside.

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
};
use qvd_guest::Exit;

/// Most that are reaped in one round, so that a desktop that forks without end
/// cannot keep the init from its other work.
const MAX_ROUND: usize = 256;

/// How often the kernel may fail to say who ended before it is left for the next
/// time: a child that is not reaped now would otherwise wait for another's end.
const MAX_FAILURES: usize = 3;

/// How a wait status says that a process ended; `None` for a mere stop.
fn ended(status: WaitStatus) -> Option<(u32, Exit)> {
    let (pid, exit) = match status {
        WaitStatus::Exited(pid, code) => (pid, Exit::Code(code)),
        WaitStatus::Signaled(pid, signal, _) => (pid, Exit::Signal(signal as i32)),
        _ => return None,
    };
    Some((u32::try_from(pid.as_raw()).ok()?, exit))
}

/// What one round of reaping found.
#[derive(Debug, Default)]
pub(crate) struct Reaped {
    /// Process ids and how they ended, in order.
    pub ended: Vec<(u32, Exit)>,
    /// Whether there may be more.
    pub more: bool,
    /// Whether no child is left at all.
    pub childless: bool,
}

/// Reaps everything that has ended, ours and orphans alike. Nothing else in
/// this program waits for a process, so a process id stays taken until here.
pub(crate) fn reap() -> Reaped {
    let mut reaped = Reaped::default();
    let mut failures = 0;
    while reaped.ended.len() < MAX_ROUND {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return reaped,
            Ok(status) => reaped.ended.extend(ended(status)),
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => {
                reaped.childless = true;
                return reaped;
            }
            Err(_) if failures < MAX_FAILURES => failures += 1,
            Err(_) => return reaped,
        }
    }
    reaped.more = true;
    reaped
}

#[cfg(test)]
mod tests {
    use nix::{sys::signal::Signal, unistd::Pid};

    use super::*;

    #[test]
    fn statuses_keep_code_and_signal() {
        let pid = Pid::from_raw(7);
        assert_eq!(ended(WaitStatus::Exited(pid, 3)), Some((7, Exit::Code(3))));
        assert_eq!(ended(WaitStatus::Signaled(pid, Signal::SIGKILL, false)), Some((7, Exit::Signal(9))));
        assert_eq!(ended(WaitStatus::Stopped(pid, Signal::SIGSTOP)), None);
    }
}
