//! Which files a disk may show the content of.
//!
//! The name of a backing file is in a file that a desktop may have written.
//! Opened unasked, it would show the desktop any file of the host.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use super::{BackingName, Fault};
use crate::{Error, disk::DiskFormat};

/// The files that may be behind a disk, directly or through others.
///
/// ```
/// use qvd_storage::qcow2::BackingPolicy;
///
/// # fn main() -> Result<(), qvd_storage::Error> {
/// let bases = tempfile::tempdir().unwrap();
/// let policy = BackingPolicy::nothing().with_dir(bases.path())?.with_depth(4);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingPolicy {
    dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
    depth: usize,
}

/// A file behind another, opened for reading.
#[derive(Debug)]
pub(super) struct Behind {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) format: DiskFormat,
}

impl BackingPolicy {
    /// How many files a disk may be made of when nothing else is said. Each
    /// costs a look-up at every read of what is in the lowest.
    pub const DEPTH: usize = 16;

    /// No file at all.
    #[must_use]
    pub const fn nothing() -> Self {
        Self { dirs: Vec::new(), files: Vec::new(), depth: Self::DEPTH }
    }

    /// Every file below this directory too, however it is reached.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn with_dir(mut self, dir: &Path) -> Result<Self, Error> {
        self.dirs.push(dir.canonicalize().map_err(Error::io("allow backing files in", dir))?);
        Ok(self)
    }

    /// This file too, however it is reached.
    ///
    /// # Errors
    /// There is no such file.
    pub fn with_file(mut self, file: &Path) -> Result<Self, Error> {
        self.files.push(file.canonicalize().map_err(Error::io("allow backing file", file))?);
        Ok(self)
    }

    /// At most so many files one behind the other, the disk's own included.
    #[must_use]
    pub const fn with_depth(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    pub(super) const fn depth(&self) -> usize {
        self.depth
    }

    /// Opens what a file names as the one behind it, if that may be; `of` is the naming file.
    pub(super) fn open(&self, backing: &BackingName, of: &Path) -> Result<Behind, Error> {
        let refuse = |why: String| {
            let fault = Fault::Backing { name: backing.name.clone(), why };
            Error::DiskFile { path: of.to_path_buf(), fault }
        };
        let format = match &backing.format {
            None => {
                return Err(refuse(
                    "has no format written with it, and a guess could be misled by its content".to_owned(),
                ));
            }
            Some(format) => format.parse::<DiskFormat>().map_err(|_| {
                refuse(format!("is said to be `{}`; only raw and qcow2 are opened", format.escape_debug()))
            })?,
        };
        // As QEMU tells a protocol from a path (`path_has_protocol`).
        if backing.name.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(refuse("names a protocol or options; only paths are followed".to_owned()));
        }
        let path = of.parent().unwrap_or(Path::new("/")).join(&backing.name);
        let io = |error: io::Error| Error::io("open backing file", &path)(error);
        // Only found at first: opening a device or a fifo can do something.
        let found = openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| io(e.into()))?;
        let kind = FileType::from_raw_mode(fstat(&found).map_err(|e| io(e.into()))?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(refuse("is neither a file nor a block device".to_owned()));
        }
        let handle = format!("/proc/self/fd/{}", found.as_fd().as_raw_fd());
        let real = fs::read_link(&handle).map_err(io)?;
        if !self.permits(&real) {
            return Err(refuse(format!("is `{}`, which is not among what may be behind a disk", real.display())));
        }
        // The one that was looked at, whatever has its name by now.
        let file = File::open(&handle).map_err(io)?;
        Ok(Behind { file, path: real, format })
    }

    fn permits(&self, real: &Path) -> bool {
        self.files.iter().any(|file| file == real) || self.dirs.iter().any(|dir| real.starts_with(dir))
    }
}

impl Default for BackingPolicy {
    fn default() -> Self {
        Self::nothing()
    }
}
