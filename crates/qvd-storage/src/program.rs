//! Programs of the host that do what no library does, with a deadline each.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use qvd_core::Missing;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::Error;

/// Where programs are looked for: what is inherited may be anybody's.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// What is kept of a program's output.
const OUTPUT_MAX: u64 = 1 << 20;

/// A program, by the name of its file, and the package that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

impl Program {
    pub(crate) fn find(self) -> Option<PathBuf> {
        DIRECTORIES.iter().map(|dir| Path::new(dir).join(self.name)).find(|path| path.is_file())
    }

    pub(crate) fn missing(self) -> Missing {
        Missing::Program(format!("{} (package {})", self.name, self.package))
    }

    /// Runs it to its end and returns what it wrote. `op` is our verb.
    pub(crate) fn run<A: AsRef<OsStr>>(
        self,
        op: &'static str,
        args: impl IntoIterator<Item = A>,
        stdin: Stdio,
        deadline: Duration,
    ) -> Result<String, Error> {
        let path = self.find().ok_or_else(|| Error::Unsupported { op, missing: self.missing() })?;
        let failed = |error: io::Error| Error::Program { op, program: self.name, reason: error.to_string() };
        let (output, errors) = (capture().map_err(failed)?, capture().map_err(failed)?);
        let clone = |file: &File| file.try_clone().map(Stdio::from).map_err(failed);
        let mut command = Command::new(path);
        command.args(args).env_clear().env("PATH", DIRECTORIES.join(":")).env("LC_ALL", "C.UTF-8").current_dir("/");
        let mut child = command.stdin(stdin).stdout(clone(&output)?).stderr(clone(&errors)?).spawn().map_err(failed)?;
        let reason = match wait(&mut child, deadline).map_err(failed)? {
            Some(status) if status.success() => return text(output).map_err(failed),
            Some(status) => {
                let said = text(errors).map_err(failed)?;
                match said.lines().rfind(|line| !line.trim().is_empty()) {
                    Some(line) => format!("says: {}", line.trim()),
                    None => format!("ended with {status}"),
                }
            }
            None => format!("did not end within {} s", deadline.as_secs()),
        };
        Err(Error::Program { op, program: self.name, reason })
    }
}

/// A file in memory: unlike a pipe it never makes the program wait for us.
fn capture() -> io::Result<File> {
    Ok(memfd_create("output", MemfdFlags::CLOEXEC)?.into())
}

fn text(mut file: File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for a program, and ends one that is not done in time.
fn wait(child: &mut Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let ended = || -> io::Result<bool> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let start = Instant::now();
        loop {
            let left = deadline.saturating_sub(start.elapsed());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    match ended() {
        Ok(true) => child.wait().map(Some),
        other => {
            child.kill()?;
            child.wait()?;
            other.map(|_| None)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sh(script: &str, deadline: Duration) -> Result<String, Error> {
        let program = Program { name: "sh", package: "dash" };
        program.run("test programs", ["-c", script], Stdio::null(), deadline)
    }

    #[test]
    fn what_a_program_says_is_in_the_error() {
        let minute = Duration::from_secs(60);
        assert_eq!(sh("echo yes", minute).unwrap(), "yes\n");
        let error = sh("echo first >&2; echo the reason >&2; exit 3", minute).unwrap_err().to_string();
        assert_eq!(error, "cannot test programs: sh says: the reason");
        let absent = Program { name: "qvd-no-such-program", package: "none" };
        let error = absent.run("test programs", [""; 0], Stdio::null(), minute).unwrap_err();
        assert_eq!(error.kind(), qvd_core::ErrorKind::Unsupported);
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let error = sh("exec sleep 1000", Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("did not end within"), "{error}");
    }
}
