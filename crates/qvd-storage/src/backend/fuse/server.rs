//! The processes that serve roots: noted, watched, and found again.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use qvd_sys::{
    mount::{FsContext, Restrictions},
    process::{Exit, Process, boot_id, start_time},
};
use rustix::{
    fs::{AtFlags, statat},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use crate::{Error, backend::RootId};

/// The note about a server, in its root's directory.
const NOTE: &str = "server.json";

/// How long a program may take to end by itself once its last mount is gone.
/// It has nothing to write then, so ending it loses nothing.
const LETS_GO_WITHIN: Duration = Duration::from_secs(1);

/// How long after the last unmount a program may still be there and the root
/// not count as used.
const ENDS_WITHIN: Duration = Duration::from_millis(300);

/// How long the kernel may take to end it.
const KILLED_WITHIN: Duration = Duration::from_secs(10);

/// Which process serves a root. It matters only while the kernel that runs it
/// does, so it is not synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    pub(super) program: String,
    pub(super) pid: u32,
    start_ticks: u64,
    boot: String,
    /// What the kernel calls the connection; absent until there is one.
    pub(super) connection: Option<u32>,
}

impl Note {
    pub(super) fn new(program: &str, pid: u32, connection: Option<u32>) -> io::Result<Self> {
        Ok(Self { program: program.to_owned(), pid, start_ticks: start_time(pid)?, boot: boot_id()?, connection })
    }

    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let new = dir.join(".new-server");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, dir.join(NOTE))
    }

    fn read(dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(dir.join(NOTE)) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The process, if it is still that one.
    fn open(&self) -> io::Result<Option<Process>> {
        let absent = |error: &io::Error| {
            error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
        };
        if self.boot != boot_id()? {
            return Ok(None);
        }
        // Opened first: a number that is taken anew begins later.
        let process = match Process::open(self.pid) {
            Ok(process) => process,
            Err(error) if absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        match start_time(self.pid) {
            Ok(start) => Ok((start == self.start_ticks).then_some(process)),
            Err(error) if absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A process that serves a root, or did.
#[derive(Debug)]
pub(super) struct Server {
    note: Note,
    pidfd: std::os::fd::OwnedFd,
    /// What it complained about; only who started it knows.
    said: Option<File>,
    /// Whether we ended it ourselves.
    ended_by_us: AtomicBool,
    /// Whether it ended under a mount, and nobody can say how.
    lost: AtomicBool,
    exit: Mutex<Option<Exit>>,
    ended: Condvar,
}

impl Server {
    pub(super) fn new(note: Note, said: Option<File>) -> Result<Self, Error> {
        let pid = i32::try_from(note.pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData);
        let pidfd = pid.map_err(io::Error::from).and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let pidfd = pidfd.map_err(Error::io("watch", &note.program))?;
        let (exit, ended) = (Mutex::default(), Condvar::new());
        let (ended_by_us, lost) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { note, pidfd, said, ended_by_us, lost, exit, ended })
    }

    /// Says whether it serves, or how it died.
    pub(super) fn check(&self, root: &RootId) -> Result<(), Error> {
        match self.exit() {
            Some(exit) if self.died(exit) => Err(self.death(root, exit)),
            _ => Ok(()),
        }
    }

    fn exit(&self) -> Option<Exit> {
        *self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an end was not that of its mounts.
    fn died(&self, exit: Exit) -> bool {
        let died = match exit {
            Exit::Code(0) => false,
            Exit::Unknown => self.lost.load(Ordering::Acquire),
            _ => true,
        };
        died && !self.ended_by_us.load(Ordering::Acquire)
    }

    /// Whether its mount is still there some time after it ended: who ends
    /// because the last mount is gone leaves none.
    fn left_its_mount(&self) -> bool {
        let Some(connection) = self.note.connection else { return false };
        let deadline = Instant::now() + ENDS_WITHIN;
        while is_connected(connection).unwrap_or(false) {
            if Instant::now() > deadline {
                return true;
            }
            thread::park_timeout(Duration::from_millis(10));
        }
        false
    }

    fn death(&self, root: &RootId, exit: Exit) -> Error {
        let said = self.said.as_ref().and_then(last_line).map(|line| format!("; it said: {line}"));
        let how = format!("{}{}", how(exit), said.unwrap_or_default());
        Error::ServerDied { root: root.clone(), program: self.note.program.clone(), pid: self.note.pid, how }
    }

    fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut exit = self.exit.lock().unwrap_or_else(PoisonError::into_inner);
        while exit.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            exit = self.ended.wait_timeout(exit, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whether somebody has the root mounted. If nobody has, the process is
    /// gone when this returns.
    fn in_use(&self) -> Result<bool, Error> {
        let failed = |error: io::Error| Error::io("ask for the use of", &self.note.program)(error);
        if self.exit().is_some() {
            return Ok(false);
        }
        match self.note.connection {
            // The kernel ends a connection some time after its last mount.
            Some(connection) if is_connected(connection).map_err(failed)? => return Ok(!self.wait(ENDS_WITHIN)),
            Some(_) if self.wait(LETS_GO_WITHIN) => return Ok(false),
            // It does not end, or was never of use.
            _ => {}
        }
        self.ended_by_us.store(true, Ordering::Release);
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(failed(error.into())),
        }
        if self.wait(KILLED_WITHIN) { Ok(false) } else { Err(failed(io::ErrorKind::TimedOut.into())) }
    }
}

/// How a process ended, as an error says it.
pub(super) fn how(exit: Exit) -> String {
    match exit {
        Exit::Code(status) => format!("ended with status {status}"),
        Exit::Signal(signal) => format!("was killed by signal {signal}"),
        _ => "ended".to_owned(),
    }
}

/// The last line of what a program wrote into a file of fixed size.
pub(super) fn last_line(file: &File) -> Option<String> {
    let mut bytes = vec![0; usize::try_from(file.metadata().ok()?.len()).ok()?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // Both programs say at every start which of libfuse's options they do without.
    let telling = |line: &&str| !line.trim().is_empty() && !line.contains("argument ignored");
    let line = text.trim_end_matches('\0').lines().rfind(telling)?;
    Some(line.trim().to_owned())
}

/// Whether the kernel has a mount of this connection anywhere.
fn is_connected(connection: u32) -> io::Result<bool> {
    let control = FsContext::open("fusectl").and_then(|context| context.mount(Restrictions::default()));
    let control = match control {
        Ok(control) => control,
        // Nobody can say; a process that lives is then taken for used.
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::NODEV) => return Ok(true),
        Err(error) => return Err(io::Error::from(error.io().kind())),
    };
    match statat(control.as_fd(), connection.to_string(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The servers of one back end that this process knows.
#[derive(Debug, Default)]
pub(super) struct Servers(Mutex<HashMap<RootId, Arc<Server>>>);

impl Servers {
    /// Remembers a server, and waits for its end on a thread.
    pub(super) fn watch(&self, root: &RootId, (server, process): (Server, Process)) -> Result<(), Error> {
        let server = Arc::new(server);
        let watched = Arc::clone(&server);
        let id = root.clone();
        let watch = move || wait_for_end(&id, &watched, process);
        let spawned = thread::Builder::new().name("fuse-watch".to_owned()).stack_size(128 << 10).spawn(watch);
        spawned.map_err(Error::io("watch", &server.note.program))?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(root.clone(), server);
        Ok(())
    }

    /// The server of the root in `dir`: one of ours, or one that a process
    /// before this one left.
    pub(super) fn find(&self, root: &RootId, dir: &Path) -> Result<Option<Arc<Server>>, Error> {
        if let Some(known) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(root) {
            return Ok(Some(Arc::clone(known)));
        }
        let io = |error| Error::io("read root", dir)(error);
        let Some(note) = Note::read(dir).map_err(io)? else { return Ok(None) };
        let Some(process) = note.open().map_err(io)? else { return Ok(None) };
        self.watch(root, (Server::new(note, None)?, process))?;
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).get(root).map(Arc::clone))
    }

    /// Says whether a root that somebody has mounted is served, or how its
    /// program died.
    pub(super) fn check(&self, root: &RootId, dir: &Path) -> Result<(), Error> {
        if let Some(server) = self.find(root, dir)? {
            return server.check(root);
        }
        let gone = || -> io::Result<Option<Note>> {
            match Note::read(dir)? {
                Some(note) if note.boot == boot_id()? => match note.connection {
                    Some(connection) => Ok(is_connected(connection)?.then_some(note)),
                    None => Ok(None),
                },
                _ => Ok(None),
            }
        };
        let Some(note) = gone().map_err(Error::io("read root", dir))? else { return Ok(()) };
        let how = "ended while nobody watched it".to_owned();
        Err(Error::ServerDied { root: root.clone(), program: note.program, pid: note.pid, how })
    }

    /// Refuses a root that is mounted anywhere. When this returns well, no
    /// process serves it, and its number can be another's.
    pub(super) fn expect_unused(&self, root: &RootId, dir: &Path) -> Result<(), Error> {
        if self.find(root, dir)?.map_or(Ok(false), |server| server.in_use())? {
            return Err(Error::RootBusy(root.clone()));
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(root);
        match fs::remove_file(dir.join(NOTE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("forget the program of", dir)(error))
            }
            _ => Ok(()),
        }
    }
}

fn wait_for_end(root: &RootId, server: &Server, mut process: Process) {
    // Longer than any clock reaches cannot be asked for.
    const LONG: Duration = Duration::from_secs(24 * 60 * 60);
    let exit = loop {
        match process.wait(LONG) {
            Ok(None) => {}
            Ok(Some(exit)) => break exit,
            Err(error) => {
                tracing::warn!(%root, %error, "cannot wait for the program that serves a root");
                break Exit::Unknown;
            }
        }
    };
    if exit == Exit::Unknown && server.left_its_mount() {
        server.lost.store(true, Ordering::Release);
    }
    if server.died(exit) {
        tracing::error!(error = %server.death(root, exit), "a root's file system is gone");
    }
    *server.exit.lock().unwrap_or_else(PoisonError::into_inner) = Some(exit);
    server.ended.notify_all();
}
