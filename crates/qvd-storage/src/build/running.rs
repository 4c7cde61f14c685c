//! A program of a build while it runs, and what it says.

use std::{
    io::{self, BufRead, BufReader, Read},
    os::fd::AsFd,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use rustix::event::{PollFd, PollFlags, poll};

use super::sandbox::{Keeper, Sandbox};
use crate::Error;

/// Most that is read of what a program says, in bytes: more than any build does.
const SAID_MAX_BYTES: u64 = 256 << 20;

/// What a program's output says about why it failed.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) no_package: Option<String>,
    pub(super) no_space: bool,
    pub(super) error: Option<String>,
}

impl Told {
    pub(super) fn hear(&mut self, line: &str) {
        let package = line.split_once("Unable to locate package ").map(|(_, rest)| rest).or_else(|| {
            line.split_once("E: Package '").and_then(|(_, rest)| rest.split_once("' has no ")).map(|(p, _)| p)
        });
        if let Some(package) = package
            && self.no_package.is_none()
        {
            self.no_package = Some(package.trim().to_owned());
        }
        // Texts of strerror(3) for ENOSPC and of apt before it starts.
        self.no_space |= line.contains("No space left on device") || line.contains("enough free space");
        if let Some(error) = line.trim_start().strip_prefix("E: ")
            && self.error.is_none()
        {
            self.error = Some(error.to_owned());
        }
    }
}

/// A child that does not outlive us.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    _keeper: Option<Keeper>,
}

impl Running {
    pub(super) fn spawn(command: &mut Command) -> Result<Self, Error> {
        let child = quiet(command).spawn().map_err(Error::io("run", command.get_program()))?;
        Ok(Self { child, _keeper: None })
    }

    /// As [`Running::spawn`], in a root of its own.
    pub(super) fn spawn_in(sandbox: &Sandbox, mut command: Command) -> Result<Self, Error> {
        quiet(&mut command);
        let (child, keeper) = sandbox.spawn(command)?;
        Ok(Self { child, _keeper: Some(keeper) })
    }

    /// Each line that it says, and none once it says no more.
    pub(super) fn lines(&mut self) -> io::Result<mpsc::Receiver<String>> {
        let (send, lines) = mpsc::channel();
        if let Some(stderr) = self.child.stderr.take() {
            let read = move || {
                for line in BufReader::new(stderr.take(SAID_MAX_BYTES)).split(b'\n').map_while(Result::ok) {
                    if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                        break;
                    }
                }
            };
            thread::Builder::new().name("build-output".to_owned()).spawn(read)?;
        }
        Ok(lines)
    }

    /// Waits until it has ended; `None` when it has not by then.
    pub(super) fn wait(&mut self, deadline: Instant) -> io::Result<Option<ExitStatus>> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let pidfd =
            rustix::process::pidfd_open(pid.ok_or(io::ErrorKind::InvalidInput)?, rustix::process::PidfdFlags::empty())?;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = rustix::time::Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::warn!(%error, "a build may still be running");
        }
    }
}

fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped())
}

/// Whether a line only tells what the sandbox keeps from mmdebstrap on purpose.
pub(super) fn is_of_the_sandbox(line: &str) -> bool {
    [
        "W: cannot mount because ",
        "unshare: unshare failed",
        "I: skipping ",
        "W: skipping ",
        "W: Host system does not have ",
    ]
    .iter()
    .any(|start| line.starts_with(start))
}

/// A line without what stands between `//` and `@` in an address.
pub(super) fn without_credentials(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("//") {
        clean.push_str(before);
        clean.push_str("//");
        let host = after.find(['/', ' ', '"', '\'']).unwrap_or(after.len());
        rest = match after.get(..host).and_then(|authority| authority.rfind('@')) {
            Some(at) => after.get(at + 1..).unwrap_or_default(),
            None => after,
        };
    }
    clean + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_do_not_reach_logs() {
        for (line, clean) in [
            ("Err http://u:p@h/x 404", "Err http://h/x 404"),
            ("a http://h/x@y b", "a http://h/x@y b"),
            ("http://u@h and https://v:w@i/", "http://h and https://i/"),
            ("// @", "// @"),
        ] {
            assert_eq!(without_credentials(line), clean);
        }
    }

    #[test]
    fn the_cause_is_found_in_what_a_program_says() {
        let mut told = Told::default();
        told.hear("I: running apt-get update...");
        told.hear("E: Unable to locate package no-such-thing");
        told.hear("E: apt-get failed");
        assert_eq!(told.no_package.as_deref(), Some("no-such-thing"));
        assert!(!told.no_space);
        let mut told = Told::default();
        told.hear("E: Package 'gone' has no installation candidate");
        told.hear("dpkg: error: write: No space left on device");
        assert_eq!(told.no_package.as_deref(), Some("gone"));
        assert!(told.no_space);
    }
}
