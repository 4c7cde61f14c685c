//! Overlays for back ends that need one for what it can do besides stacking:
//! the kernel knows whether it is mounted, wherever that is, and nothing of the
//! file system below can be reached through it but files.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use qvd_core::Support;
use qvd_sys::mount;
use rustix::{
    fs::{AtFlags, Mode, RenameFlags, mkdirat, renameat_with},
    io::Errno,
};

use super::{
    Layer, RootId,
    overlayfs::{self, How, OverlayOptions, UPPER, WORK},
};
use crate::{Error, trash::Trash};

/// The empty directory below the files of a root that has all of its own.
pub(super) const LOWER: &str = "lower";

/// Makes what an overlay needs in the open directory `own`, which `dir` names
/// in errors. What is there stays as it is.
pub(super) fn prepare(own: impl AsFd, dir: &Path) -> Result<(), Error> {
    // The upper's mode is that of `/` inside; the umask must not show there.
    for (name, mode) in [(UPPER, 0o755), (WORK, 0o700), (LOWER, 0o755)] {
        let mode = Mode::from_raw_mode(mode);
        match mkdirat(&own, name, mode) {
            Ok(()) => rustix::fs::chmodat(&own, name, mode, AtFlags::empty()).map_err(Error::io("make root", dir))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(Error::io("make root", dir)(error)),
        }
    }
    Ok(())
}

/// With an index, or the kernel would not know.
const OPTIONS: OverlayOptions = OverlayOptions::PRIVILEGED;

/// Mounts `own/upper` on the layers of a base.
pub(super) fn mount(
    id: &RootId,
    base: &[Layer],
    own: BorrowedFd<'_>,
    idmap: Option<BorrowedFd<'_>>,
    volatile: bool,
) -> Result<OwnedFd, Error> {
    mount_as(id, base, own, idmap, How { options: OPTIONS, volatile, top_of_base: true })
}

fn mount_as(
    id: &RootId,
    base: &[Layer],
    own: BorrowedFd<'_>,
    idmap: Option<BorrowedFd<'_>>,
    how: How,
) -> Result<OwnedFd, Error> {
    overlayfs::mount_overlay(base, own, idmap, how).map_err(|error| {
        match (Errno::from_io_error(error.io()), overlayfs::support(&error, Path::new(id.as_str()))) {
            (Some(Errno::BUSY), _) => Error::RootBusy(id.clone()),
            (_, Ok(Support::No(missing))) => Error::Unsupported { op: "mount roots", missing },
            _ => Error::Mount { what: format!("root {id}"), source: error },
        }
    })
}

/// Mounts the files in `dir/upper` alone.
pub(super) fn mount_alone(
    id: &RootId,
    dir: &Path,
    idmap: Option<BorrowedFd<'_>>,
    volatile: bool,
) -> Result<OwnedFd, Error> {
    let own = mount::open_dir_path(dir).map_err(Error::io("open root", dir))?;
    let how = How { options: OPTIONS, volatile, top_of_base: false };
    mount_as(id, &[Layer::Dir(dir.join(LOWER))], own.as_fd(), idmap, how)
}

/// Whether the files in `dir/upper` can be mounted.
pub(super) fn probe(dir: &Path, idmap: Option<BorrowedFd<'_>>, volatile: bool) -> Result<Support, Error> {
    let own = mount::open_dir_path(dir).map_err(Error::io("probe overlayfs below", dir))?;
    let how = How { options: OPTIONS, volatile, top_of_base: false };
    match overlayfs::mount_overlay(&[Layer::Dir(dir.join(LOWER))], own.as_fd(), idmap, how) {
        Ok(_mount) => Ok(Support::Yes),
        Err(error) => overlayfs::support(&error, dir),
    }
}

/// Whether an overlay works whose upper layer is on the mount `own`, prepared,
/// and whose base is the directory `lower`.
pub(super) fn probe_on(lower: &Path, own: BorrowedFd<'_>) -> Result<Support, Error> {
    let how = How { options: OPTIONS, volatile: true, top_of_base: false };
    match overlayfs::mount_overlay(&[Layer::Dir(lower.to_path_buf())], own, None, how) {
        Ok(_mount) => Ok(Support::Yes),
        Err(error) => overlayfs::support(&error, lower),
    }
}

/// Says whether the root in `dir` is mounted anywhere.
pub(super) fn check_unused(id: &RootId, dir: &Path, trash: &Trash) -> Result<(), Error> {
    overlayfs::check_unused(id, dir, OPTIONS, trash)
}

/// As [`check_unused`], for a root that is removed next.
pub(super) fn check_before_removal(id: &RootId, dir: &Path, trash: &Trash) -> Result<(), Error> {
    overlayfs::check_before_removal(id, dir, OPTIONS, trash)
}

/// Takes away what the kernel noted in a copy about where its original was:
/// it would refuse to mount it as an exclusive one.
pub(super) fn forget_origin(dir: &Path) -> Result<(), Error> {
    let upper = dir.join(UPPER);
    // Source: Linux `fs/overlayfs/overlayfs.h`, `OVL_XATTR_ORIGIN` and `OVL_XATTR_UUID`.
    for name in ["trusted.overlay.origin", "trusted.overlay.uuid"] {
        match rustix::fs::lremovexattr(&upper, name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(Error::io("copy root to", &upper)(error)),
        }
    }
    // The index of the original goes with the copy: emptying it would take as
    // long as it is large, and it holds nothing but further names of files.
    let own = mount::open_dir_path(dir).map_err(Error::io("copy root to", dir))?;
    for generation in 1_u32.. {
        match renameat_with(&own, WORK, &own, format!("{WORK}-{generation}"), RenameFlags::NOREPLACE) {
            Ok(()) | Err(Errno::NOENT) => break,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(Error::io("copy root to", dir)(error)),
        }
    }
    prepare(&own, dir)
}
