//! One root, and the question whether it is in use.

use std::{
    fs, io, iter,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{RootPolicy, Support};
use qvd_sys::mount::{self, MountError};
use rustix::{
    fs::{AtFlags, Mode, mkdirat},
    io::Errno,
};

use super::{
    OverlayOptions,
    options::support,
    stack::{How, UPPER, VOLATILE_MARK, WORK, mount_overlay_and_layers, unmark_volatile},
};
use crate::{
    Error,
    backend::{
        BaseTree, Layer, Place, Root, RootId,
        layer::{self, Image},
    },
    trash::Trash,
};

/// A link to the uppermost layer of the base. A link is made whole or not at
/// all without a sync.
const BASE: &str = "base";

/// Notes the uppermost layer of the base of the root in `dir`.
pub(crate) fn note_base(dir: &Path, base: &Path) -> io::Result<()> {
    let link = dir.join(BASE);
    match std::os::unix::fs::symlink(base, &link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        done => return done,
    }
    if fs::read_link(&link).is_ok_and(|noted| noted == base) {
        return Ok(());
    }
    fs::remove_file(&link)?;
    std::os::unix::fs::symlink(base, link)
}

/// The uppermost layer of a root's base, if it is there still.
fn noted_base(dir: &Path) -> Option<Layer> {
    let path = fs::read_link(dir.join(BASE)).ok()?;
    let kind = fs::symlink_metadata(&path).ok()?.file_type();
    if kind.is_dir() { Some(Layer::Dir(path)) } else { kind.is_file().then_some(Layer::Erofs(path)) }
}

#[derive(Debug)]
pub(super) struct Overlay {
    id: RootId,
    dir: PathBuf,
    base: BaseTree,
    policy: RootPolicy,
    options: OverlayOptions,
    place: Place,
    closed: bool,
    /// Image files that are mounted: who mounts one of them meanwhile gets the
    /// same file system, and shares its page cache.
    images: Mutex<Vec<Arc<Image>>>,
}

impl Overlay {
    pub(super) const fn new(
        id: RootId,
        dir: PathBuf,
        base: BaseTree,
        policy: RootPolicy,
        options: OverlayOptions,
        place: Place,
    ) -> Self {
        Self { id, dir, base, policy, options, place, closed: false, images: Mutex::new(Vec::new()) }
    }

    /// Throws away what was written so far, if nobody is using it.
    fn retire(&self) -> Result<(), Error> {
        check_unused(&self.id, &self.dir, self.options, self.place.trash())?;
        self.place.discard(&self.dir.join(UPPER))?;
        self.place.discard(&self.dir.join(WORK))
    }

    fn explain(&self, error: MountError) -> Error {
        match (Errno::from_io_error(error.io()), support(&error, &self.dir)) {
            (Some(Errno::BUSY), _) => Error::RootBusy(self.id.clone()),
            (_, Ok(Support::No(missing))) => Error::Unsupported { op: "mount roots", missing },
            _ => Error::Mount { what: format!("root {}", self.id), source: error },
        }
    }
}

impl Root for Overlay {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let volatile = self.policy == RootPolicy::Volatile;
        if volatile {
            self.retire()?;
        }
        let own = mount::open_dir_path(&self.dir).map_err(Error::io("open root", &self.dir))?;
        for (name, mode) in [(UPPER, 0o755), (WORK, 0o700)] {
            match mkdirat(&own, name, Mode::from_raw_mode(mode)) {
                // The upper's mode is that of `/` inside; the umask must not show there.
                Ok(()) => rustix::fs::chmodat(&own, name, Mode::from_raw_mode(mode), AtFlags::empty())
                    .map_err(Error::io("make root", &self.dir))?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("make root", &self.dir)(error)),
            }
        }
        let images = layer::images(self.base.layers()).map_err(|error| self.explain(error))?;
        *self.images.lock().unwrap_or_else(PoisonError::into_inner) = images;
        let how = How { options: self.options, volatile, top_of_base: true };
        let mounted = mount_overlay_and_layers(self.base.layers(), own.as_fd(), idmap, how);
        let (mount, layers) = mounted.map_err(|error| self.explain(error))?;
        self.place.trash().close_later(layers);
        Ok(mount)
    }

    fn close(&mut self) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        if self.policy == RootPolicy::Volatile {
            check_before_removal(&self.id, &self.dir, self.options, self.place.trash())?;
            self.place.discard(&self.dir)?;
        }
        self.images.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.closed = true;
        Ok(())
    }
}

/// Asks the kernel whether a root is mounted anywhere, in whatever process
/// and mount namespace, by trying to mount it: `index=on` makes that exclusive.
pub(crate) fn check_unused(id: &RootId, dir: &Path, options: OverlayOptions, trash: &Trash) -> Result<(), Error> {
    try_to_mount(id, dir, options, trash).map(drop)
}

/// As [`check_unused`], for a root that is removed next: what was mounted to find out
/// is in nobody's way then, and is closed when it suits.
pub(crate) fn check_before_removal(
    id: &RootId,
    dir: &Path,
    options: OverlayOptions,
    trash: &Trash,
) -> Result<(), Error> {
    trash.close_later(try_to_mount(id, dir, options, trash)?);
    Ok(())
}

/// Mounts a root that nobody uses, and returns all that was mounted for that.
fn try_to_mount(id: &RootId, dir: &Path, options: OverlayOptions, trash: &Trash) -> Result<Vec<OwnedFd>, Error> {
    let own = match mount::open_dir_path(dir) {
        Ok(own) => own,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("open root", dir)(error)),
    };
    for name in [UPPER, WORK] {
        match rustix::fs::statat(&own, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => {}
            // Nothing can have mounted half a root.
            Err(Errno::NOENT) => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read root", dir)(error)),
        }
    }
    clear_volatile_marker(&own, trash).map_err(Error::io("clean root", dir))?;
    // On another base the kernel would refuse and complain in its log, after
    // it has answered the question; that is the way out when the base is gone.
    let base = noted_base(dir).unwrap_or_else(|| Layer::Dir(dir.to_path_buf()));
    // Volatile, or else its end would sync the whole file system.
    let how = How { options, volatile: true, top_of_base: false };
    let mounts = match mount_overlay_and_layers(&[base], own.as_fd(), None, how) {
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::BUSY) => {
            return Err(Error::RootBusy(id.clone()));
        }
        Err(_) => Vec::new(),
        Ok((mount, layers)) => iter::once(mount).chain(layers).collect(),
    };
    clear_volatile_marker(&own, trash).map_err(Error::io("clean root", dir))?;
    Ok(mounts)
}

/// Takes away what a volatile mount leaves, in one step where that can be.
fn clear_volatile_marker(own: &OwnedFd, trash: &Trash) -> io::Result<()> {
    match trash.set_aside_at(own, VOLATILE_MARK) {
        // The root is a file system of its own, or a subvolume.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => unmark_volatile(own.as_fd()),
        done => done.map(drop),
    }
}
