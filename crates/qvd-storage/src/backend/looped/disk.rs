//! Files with an ext4 each: made, copied, mounted.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use qvd_core::{Bytes, Missing};
use qvd_sys::{
    loopdev::{self, LoopDevice},
    mount::{FsContext, MountError, Restrictions},
};
use rustix::io::Errno;

use crate::{
    Error,
    backend::{Place, exclusive, reserve},
    copytree::Content,
    fsio,
    program::Program,
};

const MKFS: Program = Program { name: "mkfs.ext4", package: "e2fsprogs" };

/// Making a sparse file system writes a few megabytes; a disk that is very
/// busy needs longer for that.
const MADE_WITHIN: Duration = Duration::from_secs(120);

/// Where templates are, in the place; no root has a name in capital letters.
const TEMPLATES: &str = "TEMPLATES";

/// The template that is being made, among them.
const NEW: &str = "new";

/// Files of a work directory: `work`, `index` and the three of a volatile mount,
/// with some to spare.
const OVERLAY_INODES: u64 = 8;

/// What distinguishes one empty file system from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Size of the file system, its own needs included.
    pub(crate) bytes: Bytes,
    /// How many files it can hold; as many as fit on average if not said.
    pub(crate) inodes: Option<u64>,
    /// Whether it is whole after a crash of the host.
    pub(crate) journal: bool,
}

impl Shape {
    /// Below this, ext4 has no room for what it needs itself and files besides.
    pub(crate) const SMALLEST: Self = Self { bytes: Bytes::mib(4), inodes: None, journal: false };

    fn name(self) -> String {
        let inodes = self.inodes.map_or("any".to_owned(), |count| count.to_string());
        format!("{}-{inodes}-{}", self.bytes.get(), if self.journal { "journal" } else { "plain" })
    }
}

/// Empty file systems with the directories of an overlay, each made once.
#[derive(Debug)]
pub(super) struct Templates {
    place: Place,
}

impl Templates {
    pub(super) const fn new(place: Place) -> Self {
        Self { place }
    }

    /// Makes the file `to` a file system of this shape.
    pub(super) fn copy(&self, shape: Shape, to: &Path) -> Result<File, Error> {
        let template = self.get(shape)?;
        let copy = || {
            let from = File::open(&template)?;
            let to = File::options().read(true).write(true).create_new(true).open(to)?;
            let size = from.metadata()?.len();
            to.set_len(size)?;
            Content::Cheapest.fill(&from, &to, size)?;
            Ok(to)
        };
        copy().map_err(|error: io::Error| Error::io("make disk", to)(error))
    }

    fn get(&self, shape: Shape) -> Result<PathBuf, Error> {
        let dir = self.place.dir().join(TEMPLATES);
        let template = dir.join(shape.name());
        if template.try_exists().map_err(Error::io("read", &template))? {
            return Ok(template);
        }
        fsio::ensure_private_dir(&dir).map_err(Error::io("use", &dir))?;
        let io = |error: io::Error| Error::io("make disk", &template)(error);
        // One at a time, in a file of one name: what a killed process left of
        // it is overwritten by the next, and its lock is gone.
        let lock = File::open(&dir).and_then(|dir| dir.lock().map(|()| dir)).map_err(io)?;
        if template.try_exists().map_err(Error::io("read", &template))? {
            return Ok(template);
        }
        let new = dir.join(NEW);
        make(shape, &new)?;
        {
            let own = mount(&new)?;
            exclusive::prepare(own.as_fd(), &template)?;
            if let Some(inodes) = shape.inodes {
                // With what the kernel makes for an overlay.
                reserve::inodes(&own, inodes.saturating_add(OVERLAY_INODES), &template)?;
            }
            let top = fsio::open_dir_below(&own, ".").map_err(io)?;
            rustix::fs::syncfs(top).map_err(io::Error::from).map_err(io)?;
        }
        File::open(&new).and_then(|file| file.sync_all()).map_err(io)?;
        fs::rename(&new, &template).and_then(|()| fsio::sync_dir(&dir)).map_err(io)?;
        drop(lock);
        Ok(template)
    }
}

/// Makes the file `path` an empty file system, whatever it was.
pub(crate) fn make(shape: Shape, path: &Path) -> Result<(), Error> {
    let file =
        File::options().write(true).create(true).truncate(true).open(path).map_err(Error::io("make disk", path))?;
    file.set_len(shape.bytes.get()).map_err(Error::io("make disk", path))?;
    let mut args: Vec<String> = ["-q", "-F", "-m", "0"].map(str::to_owned).to_vec();
    // Nothing is kept back for growing, and nothing is written that a hole
    // in the file says as well.
    let features = if shape.journal { "^resize_inode" } else { "^resize_inode,^has_journal" };
    args.extend(["-O", features, "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"].map(str::to_owned));
    if let Some(inodes) = shape.inodes {
        // Ten are the file system's own, and what an overlay has counts.
        args.extend(["-N".to_owned(), inodes.saturating_add(24).to_string()]);
    }
    args.push(path.to_string_lossy().into_owned());
    MKFS.run("make a file system for roots", args, Stdio::null(), MADE_WITHIN).map(drop)
}

/// Mounts a disk; its loop device goes with the mount.
pub(crate) fn mount(disk: &Path) -> Result<OwnedFd, Error> {
    let file = File::options().read(true).write(true).open(disk).map_err(Error::io("open disk", disk))?;
    let device = LoopDevice::attach(file.as_fd(), false).map_err(|error| {
        let missing = match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => Missing::Device("/dev/loop-control".to_owned()),
            Some(Errno::NOSPC | Errno::NOMEM | Errno::BUSY) => {
                Missing::Device("a free loop device (see `max_loop` of the module `loop`)".to_owned())
            }
            Some(Errno::PERM | Errno::ACCESS) => Missing::Privilege("use loop devices".to_owned()),
            _ => return Error::io("attach a loop device to", disk)(error),
        };
        Error::Unsupported { op: "mount disks", missing }
    })?;
    let mounted = || {
        let context = FsContext::open("ext4")?;
        context.set("source", &device.path().to_string_lossy())?;
        context.mount(Restrictions { nodev: true, ..Restrictions::default() })
    };
    mounted().map_err(|source: MountError| match Errno::from_io_error(source.io()) {
        Some(Errno::NODEV) => {
            Error::Unsupported { op: "mount disks", missing: Missing::Kernel("the file system ext4".to_owned()) }
        }
        Some(Errno::PERM) => {
            Error::Unsupported { op: "mount disks", missing: Missing::Privilege("mount file systems".to_owned()) }
        }
        _ => Error::Mount { what: format!("disk `{}`", disk.display()), source },
    })
}

/// Whether a disk is mounted anywhere; one that is not there is not.
pub(crate) fn in_use(disk: &Path) -> Result<bool, Error> {
    match File::open(disk) {
        Ok(file) => loopdev::in_use(&file).map_err(Error::io("ask for the use of disk", disk)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("open disk", disk)(error)),
    }
}
