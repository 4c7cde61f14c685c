//! Programs that the node runs inside.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    process::Stdio,
};

use qvd_guest::ExecRequest;
use rustix::{
    io::Errno,
    process::{Pid, Signal},
    pty::OpenptFlags,
    termios::Winsize,
};

use crate::spawn::{self, Identity, Program};

/// A running program of the node's.
#[derive(Debug)]
pub(crate) struct Exec {
    pid: u32,
    terminal: Option<OwnedFd>,
}

const fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A terminal: its master, and its slave for the program.
fn terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    // By descriptor, so that nothing mounted over /dev/pts can come between.
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, size(rows, columns))?;
    Ok((master, slave))
}

impl Exec {
    /// Starts what `request` asks for, on `fds` or on a terminal of its own.
    ///
    /// # Errors
    /// The request or its descriptors are not as they should be, or there is no
    /// process or terminal to be had.
    pub(crate) fn start(
        request: &ExecRequest,
        fds: Vec<OwnedFd>,
        base: &BTreeMap<String, String>,
        identity: &Identity,
    ) -> io::Result<Self> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
        if request.argv.first().is_none_or(String::is_empty) {
            return Err(invalid("no program was named"));
        }
        let mut env = base.clone();
        env.extend(request.env.clone());
        if request.tty.is_some() {
            env.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
        }
        let program = Program { argv: &request.argv, env: &env, identity, terminal: request.tty.is_some() };
        if let Some((rows, columns)) = request.tty {
            let (master, slave) = terminal(rows, columns)?;
            let (stdin, stdout): (Stdio, Stdio) = (slave.try_clone()?.into(), slave.try_clone()?.into());
            let pid = spawn::spawn(&program, stdin, stdout, slave.into())?;
            return Ok(Self { pid, terminal: Some(master) });
        }
        let [stdin, stdout, stderr] =
            <[OwnedFd; 3]>::try_from(fds).map_err(|_| invalid("three descriptors are needed"))?;
        let pid = spawn::spawn(&program, stdin.into(), stdout.into(), stderr.into())?;
        Ok(Self { pid, terminal: None })
    }

    /// Its process id inside.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// The master of its terminal.
    pub(crate) fn terminal(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.terminal.as_ref().map(AsFd::as_fd)
    }

    /// Tells its terminal a new size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        if let Some(master) = &self.terminal {
            // The program may have ended; its exit is on the way.
            let _done = rustix::termios::tcsetwinsize(master, size(rows, columns));
        }
    }

    /// Sends a signal by its number to the program and its group. The program
    /// is not reaped while this is reachable, so its number is still its own.
    pub(crate) fn signal(&self, number: i32) {
        if let Some(signal) = Signal::from_named_raw(number) {
            let _done = group(self.pid, signal);
        }
    }
}

/// Sends `signal` to the group that `pid` leads; to itself alone while it has
/// not yet made its group.
pub(crate) fn group(pid: u32, signal: Signal) -> Result<(), Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    match rustix::process::kill_process_group(pid, signal) {
        Err(Errno::SRCH) => rustix::process::kill_process(pid, signal),
        other => other,
    }
}
