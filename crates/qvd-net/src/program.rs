//! Programs of the host that take whole rule sets: `nft`, and the `-restore`
//! commands of ebtables and iptables.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use qvd_core::Missing;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::MemfdFlags,
    process::{PidfdFlags, pidfd_open},
};

use crate::Error;

/// Where distributions put programs. The caller's PATH is not asked.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"];

/// Longest run. A rule set of this crate takes tens of milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Most of an error text that is read.
const STDERR_MAX: u64 = 4096;

/// Most of an output that is read: the rules of a thousand ports.
const STDOUT_MAX: u64 = 16 << 20;

/// A program, and the package that brings it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const NFT: Program = Program { name: "nft", package: "nftables" };

/// Runs `program` on `text` as its input, in the calling thread's namespace,
/// for the rules of `table`. Returns what it wrote.
pub(crate) fn run(program: Program, args: &[&str], table: &str, text: &str) -> Result<String, Error> {
    let Some(path) = PLACES.iter().map(|place| Path::new(place).join(program.name)).find(|path| path.exists()) else {
        let missing = Missing::Program(format!("{} (package {})", program.name, program.package));
        return Err(Error::Unsupported { op: "filter frames", missing });
    };
    let err = |source| Error::Io { op: "run", object: program.name.to_owned(), source };
    // Files instead of pipes: neither side can block the other.
    let mut input = memory_file("qvd-rules").map_err(err)?;
    input.write_all(text.as_bytes()).and_then(|()| input.rewind()).map_err(err)?;
    let mut said = memory_file("qvd-rules-stderr").map_err(err)?;
    let mut shown = memory_file("qvd-rules-stdout").map_err(err)?;
    let mut child = Command::new(path)
        .args(args)
        .env_clear()
        // Older ones of ebtables are asked so for what `-c` asks of the others.
        .env("EBTABLES_SAVE_COUNTER", "yes")
        .current_dir("/")
        .stdin(input)
        .stdout(shown.try_clone().map_err(err)?)
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
    let mut text = String::new();
    if status.success() {
        let read = shown.rewind().and_then(|()| shown.take(STDOUT_MAX).read_to_string(&mut text));
        return read.map(|_| text).map_err(err);
    }
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
