//! The few operations on cgroup directories, so that the v2 side is tested on
//! hosts that have v1.

use std::{fmt, fs, io, io::Write, path::Path};

/// A tree of cgroups.
pub(crate) trait Tree: fmt::Debug + Send + Sync {
    /// Makes a group.
    fn make(&self, path: &Path) -> io::Result<()>;
    /// Removes a group.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Writes a control file in one write.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;
    /// Reads a control file.
    fn read(&self, path: &Path) -> io::Result<String>;
    /// Gives a group or a control file to a user of the host and its group.
    fn give(&self, path: &Path, owner: u32) -> io::Result<()>;
    /// Names of the groups below `path`; none if it is absent.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Whether there is such a group.
    fn exists(&self, path: &Path) -> io::Result<bool> {
        match self.read(&path.join("cgroup.procs")) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Numbers of the processes in a group; none if it is absent.
    fn processes(&self, path: &Path) -> io::Result<Vec<u32>> {
        match self.read(&path.join("cgroup.procs")) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            // ENODEV: removed between open and read.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// The kernel's, below `/sys/fs/cgroup`.
#[derive(Debug)]
pub(crate) struct Kernel;

impl Tree for Kernel {
    fn make(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let written = fs::OpenOptions::new().write(true).open(path)?.write(value.as_bytes())?;
        if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }

    fn give(&self, path: &Path, owner: u32) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(owner), Some(owner))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }
}
