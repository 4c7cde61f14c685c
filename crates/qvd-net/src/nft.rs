//! The `nft` program, for whole rule sets.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use qvd_core::Missing;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::MemfdFlags,
    process::{PidfdFlags, pidfd_open},
};

use crate::Error;

/// Where distributions put it. The caller's PATH is not asked.
const PLACES: [&str; 4] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft"];

/// Longest run. A rule set of this crate takes tens of milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Most of an error text that is read.
const STDERR_MAX: u64 = 4096;

/// Carries out `text` as one transaction, in the calling thread's namespace.
pub(crate) fn load(table: &str, text: &str) -> Result<(), Error> {
    let op = "run";
    let Some(program) = PLACES.iter().find(|place| Path::new(place).exists()) else {
        let missing = Missing::Program("nft (package nftables)".to_owned());
        return Err(Error::Unsupported { op: "filter frames", missing });
    };
    let err = |source| Error::Io { op, object: (*program).to_owned(), source };
    // Files instead of pipes: neither side can block the other.
    let mut input = memory_file("qvd-rules").map_err(err)?;
    input.write_all(text.as_bytes()).and_then(|()| input.rewind()).map_err(err)?;
    let mut said = memory_file("qvd-nft-stderr").map_err(err)?;
    let mut child = Command::new(program)
        .args(["-f", "-"])
        .env_clear()
        .current_dir("/")
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(said.try_clone().map_err(err)?)
        .spawn()
        .map_err(err)?;
    let status = match wait(&child, TIMEOUT) {
        Ok(()) => child.wait().map_err(err)?,
        Err(error) => {
            // Ended or not, it is collected; its own end is the only failure.
            let _ended = child.kill();
            let _status = child.wait();
            return Err(err(error));
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let read = said.rewind().and_then(|()| said.take(STDERR_MAX).read_to_string(&mut text));
    let said = match read {
        Ok(_) => text.lines().next().unwrap_or("it said nothing").chars().flat_map(char::escape_default).collect(),
        Err(_) => "what it said is not text".to_owned(),
    };
    Err(Error::Rules { table: table.to_owned(), said })
}

fn memory_file(name: &str) -> io::Result<File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

fn wait(child: &Child, timeout: Duration) -> io::Result<()> {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time")),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
