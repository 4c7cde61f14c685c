//! Which options overlays are made with, found by trying.

use std::{
    fmt, fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use qvd_core::{Missing, Support};
use qvd_sys::mount::{self, MountError};
use rustix::{fs::XattrFlags, io::Errno};
use serde::Serialize;

use super::stack::{How, UPPER, WORK, mount_overlay};
use crate::{Error, backend::Layer};

/// How overlays are made on this host and file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OverlayOptions {
    /// Notes about layers are kept in attributes that anybody may write
    /// (`userxattr`), because this process may not write others.
    pub userxattr: bool,
    /// Hard links of the image stay one file after a copy-up, and a root that
    /// is mounted cannot be mounted or removed by mistake (`index`).
    pub index: bool,
    /// Renaming a directory of the image works (`redirect_dir`). Only root
    /// outside can set the attribute that this follows; so never with `userxattr`.
    pub redirect_dir: bool,
}

impl OverlayOptions {
    /// For those who may write `trusted` attributes.
    pub(crate) const PRIVILEGED: Self = Self { userxattr: false, index: true, redirect_dir: true };
    /// For those who may not; the kernel refuses redirects with it.
    pub(super) const UNPRIVILEGED: Self = Self { userxattr: true, index: true, redirect_dir: false };

    pub(super) fn choose(dir: &Path) -> Result<Self, Error> {
        let io = |error: Errno| Error::io("probe overlayfs below", dir)(error);
        let lacks = |op, attributes: &str| Error::Unsupported {
            op,
            missing: Missing::Filesystem(format!("`{attributes}` extended attributes")),
        };
        match attribute(dir, "trusted.qvd-probe") {
            Ok(()) => return Ok(Self::PRIVILEGED),
            Err(Errno::PERM) => {}
            Err(Errno::OPNOTSUPP) => return Err(lacks("make roots", "trusted")),
            Err(error) => return Err(io(error)),
        }
        match attribute(dir, "user.qvd-probe") {
            Ok(()) => {}
            Err(Errno::PERM | Errno::OPNOTSUPP) => return Err(lacks("make roots without privileges", "user")),
            Err(error) => return Err(io(error)),
        }
        let scratch = Scratch::new(dir)?;
        let first = scratch.mount(None, Self::UNPRIVILEGED, false);
        // Where the kernel cannot keep an index it mounts without one, and twice.
        let exclusive = first.is_ok() && scratch.mount(None, Self::UNPRIVILEGED, false).is_err();
        Ok(Self { index: exclusive, ..Self::UNPRIVILEGED })
    }
}

impl fmt::Display for OverlayOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = if self.index { "on" } else { "off" };
        let redirect = if self.redirect_dir { "on" } else { "nofollow" };
        write!(f, "index={index},redirect_dir={redirect},metacopy=off,xino=auto")?;
        if self.userxattr { f.write_str(",userxattr") } else { Ok(()) }
    }
}

/// Sets an attribute of a directory and removes it.
fn attribute(dir: &Path, name: &str) -> Result<(), Errno> {
    rustix::fs::lsetxattr(dir, name, b"", XattrFlags::empty())?;
    rustix::fs::lremovexattr(dir, name)
}

/// A base and a root to try things on.
pub(super) struct Scratch {
    dir: tempfile::TempDir,
    base: Vec<Layer>,
}

impl Scratch {
    pub(super) fn new(place: &Path) -> Result<Self, Error> {
        let make = || {
            let dir = tempfile::Builder::new().prefix(".probe-").tempdir_in(place)?;
            for name in ["lower", UPPER, WORK] {
                fs::create_dir(dir.path().join(name))?;
            }
            Ok(Self { base: vec![Layer::Dir(dir.path().join("lower"))], dir })
        };
        make().map_err(|error: io::Error| Error::io("probe overlayfs below", place)(error))
    }

    pub(super) fn mount(
        &self,
        idmap: Option<BorrowedFd<'_>>,
        options: OverlayOptions,
        volatile: bool,
    ) -> Result<OwnedFd, MountError> {
        let own = mount::open_dir_path(self.dir.path()).map_err(|e| MountError::new("open a directory", e))?;
        mount_overlay(&self.base, own.as_fd(), idmap, How { options, volatile, top_of_base: false })
    }
}

/// What an error says about the host; an error that says nothing stays one.
pub(crate) fn support(error: &MountError, dir: &Path) -> Result<Support, Error> {
    if let Some(what) = error.lacks() {
        return Ok(Support::No(Missing::Kernel(format!("{what}: {error}"))));
    }
    let missing = match Errno::from_io_error(error.io()) {
        Some(Errno::PERM | Errno::ACCESS) => Missing::Privilege("mount file systems".to_owned()),
        Some(Errno::NODEV) => Missing::Kernel("overlayfs".to_owned()),
        Some(Errno::NOSYS) => Missing::Kernel("the mount API of Linux 5.12".to_owned()),
        Some(Errno::INVAL | Errno::OPNOTSUPP | Errno::ROFS) => {
            Missing::Filesystem(format!("what an id-mapped overlay needs ({error})"))
        }
        _ => {
            let source = io::Error::from(error.io().kind());
            return Err(Error::Io { op: "probe overlayfs below", path: dir.to_path_buf(), source });
        }
    };
    Ok(Support::No(missing))
}
