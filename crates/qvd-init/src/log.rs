//! What services and the session print: kept inside the desktop, and bounded.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use rustix::{fs::OFlags, io::Errno, pipe::PipeFlags};

/// Largest log file, in bytes; there are two, this one and the one before.
const MAX_FILE: u64 = 128 * 1024;

/// Most that is read at once, so that a program that floods the log cannot
/// keep the init from its other work.
const MAX_READ: usize = 4096;

/// The log and the pipe that feeds it.
#[derive(Debug)]
pub(crate) struct Log {
    reader: OwnedFd,
    writer: OwnedFd,
    path: PathBuf,
    file: File,
    length: u64,
    begin: Instant,
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .custom_flags(i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0))
        .open(path)
}

impl Log {
    /// Starts an empty log at `path`, whose directory only root may write to.
    pub(crate) fn new(path: PathBuf, begin: Instant) -> io::Result<Self> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK)?;
        Ok(Self { reader, writer, file: create(&path)?, path, length: 0, begin })
    }

    /// An end of the pipe for a program's standard output or error.
    pub(crate) fn stdio(&self) -> io::Result<Stdio> {
        Ok(self.writer.try_clone()?.into())
    }

    /// Notes something of the init's own.
    pub(crate) fn note(&mut self, text: &str) {
        let now = self.begin.elapsed().as_secs_f64();
        self.append(format!("qvd-init {now:.3}: {text}\n").as_bytes());
    }

    /// Moves what programs printed from the pipe to the file.
    pub(crate) fn drain(&mut self) {
        let mut bytes = [0; MAX_READ];
        match rustix::io::read(&self.reader, &mut bytes) {
            Ok(got) => self.append(bytes.get(..got).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Nobody to tell: this is where errors are told.
            Err(_) => {}
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.length >= MAX_FILE && fs::rename(&self.path, self.path.with_extension("old")).is_ok() {
            if let Ok(file) = create(&self.path) {
                self.file = file;
            }
            self.length = 0;
        }
        if self.length < MAX_FILE && self.file.write_all(bytes).is_ok() {
            self.length += u64::try_from(bytes.len()).unwrap_or(MAX_FILE);
        }
    }
}

impl AsFd for Log {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_stays_within_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::new(dir.path().join("log"), Instant::now()).unwrap();
        let line = "x".repeat(1000);
        for _ in 0..1000 {
            log.note(&line);
        }
        log.note("the last");
        let sizes: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|&size| size <= MAX_FILE + 4096), "{sizes:?}");
        assert!(fs::read_to_string(dir.path().join("log")).unwrap().ends_with("the last\n"));
    }

    #[test]
    fn what_a_program_prints_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::new(dir.path().join("log"), Instant::now()).unwrap();
        rustix::io::write(&log.writer, b"hello\n").unwrap();
        log.drain();
        log.drain();
        assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), "hello\n");
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("log")).unwrap();
        assert!(Log::new(dir.path().join("log"), Instant::now()).is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    }
}
