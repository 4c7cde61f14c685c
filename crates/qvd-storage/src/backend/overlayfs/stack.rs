//! One overlay: its layers opened, its options set, its mount made.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use qvd_sys::mount::{self, FsContext, MountError, Restrictions};
use rustix::{
    fs::{
        AtFlags, Gid, Mode, OFlags, StatVfsMountFlags, Timespec, Timestamps, Uid, chmodat, chownat, fstat, fstatvfs,
        openat, statat, unlinkat, utimensat,
    },
    io::Errno,
};

use super::OverlayOptions;
use crate::backend::{
    Layer,
    layer::{self, Opened},
};

/// The directories of a root, in its own.
pub(crate) const UPPER: &str = "upper";
pub(crate) const WORK: &str = "work";
/// What a volatile mount leaves in its root's own directory.
pub(super) const VOLATILE_MARK: &str = "work/work/incompat";

/// How an overlay is mounted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) options: OverlayOptions,
    /// Nothing of it has to outlive a crash.
    pub(crate) volatile: bool,
    /// Its `/` shows as that of the base until somebody changes it. Otherwise
    /// the upper layer has its own already.
    pub(crate) top_of_base: bool,
}

/// Stacks `own/upper` on the base's layers and returns the detached mount.
pub(crate) fn mount_overlay(
    base: &[Layer],
    own: BorrowedFd<'_>,
    idmap: Option<BorrowedFd<'_>>,
    how: How,
) -> Result<OwnedFd, MountError> {
    mount_overlay_and_layers(base, own, idmap, how).map(|(mount, _)| mount)
}

/// As [`mount_overlay`], with the mounts of the layers, which the overlay has a copy
/// of: to be closed when it suits.
pub(super) fn mount_overlay_and_layers(
    base: &[Layer],
    own: BorrowedFd<'_>,
    idmap: Option<BorrowedFd<'_>>,
    how: How,
) -> Result<(OwnedFd, Vec<OwnedFd>), MountError> {
    let How { options, volatile, top_of_base } = how;
    if !volatile {
        // Left by a process that was killed while it asked whether the root is
        // in use: what was mounted so was not written to.
        unmark_volatile(own).map_err(|e| MountError::new("clean the work directory of an overlay", e))?;
    }
    let layers = Layers::new(base, own, idmap)?;
    if top_of_base {
        layers.show_top_of_base(own).map_err(|e| MountError::new("give an overlay the attributes of its base", e))?;
    }
    let stack = || match layers.stack(options, volatile) {
        // The layers' file handles changed, as when a store was copied to
        // another disk. Content is verified by digest, not by handle; only
        // hard links made before lose their common identity.
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::STALE) => {
            tracing::warn!(%error, "layers were copied since; mounting without index");
            layers.stack(OverlayOptions { index: false, ..options }, volatile)
        }
        done => done,
    };
    // What the map makes of root, whose the upper is on disk.
    let root = fstat(&layers.upper).map_err(|e| MountError::new("read the upper layer", e.into()))?;
    let mount = match idmap {
        None => stack(),
        Some(_) => mount::with_fs_ids(root.st_uid, root.st_gid, stack)
            .map_err(|e| MountError::new("become root of the id map", e))
            .flatten(),
    }?;
    Ok((mount, layers.into_mounts()))
}

pub(super) struct Layers {
    lowers: Vec<Opened>,
    own: OwnedFd,
    upper: OwnedFd,
    work: OwnedFd,
}

impl Layers {
    pub(super) fn new(base: &[Layer], own: BorrowedFd<'_>, idmap: Option<BorrowedFd<'_>>) -> Result<Self, MountError> {
        let lowers = base.iter().map(|layer| layer::open(layer, idmap)).collect::<Result<_, _>>()?;
        let open = || {
            // One mount for upper and work: overlayfs asks for that.
            let own = mount::clone_dir(own)?;
            mount::restrict(own.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let upper = openat(&own, UPPER, flags, Mode::empty())?;
            let work = openat(&own, WORK, flags, Mode::empty())?;
            io::Result::Ok((own, upper, work))
        };
        let (own, upper, work) = open().map_err(|e| MountError::new("clone the upper layer of an overlay", e))?;
        Ok(Self { lowers, own, upper, work })
    }

    fn into_mounts(self) -> Vec<OwnedFd> {
        let lowers = self.lowers.into_iter().map(|layer| layer.mount);
        lowers.chain([self.own]).collect()
    }

    /// Gives an upper layer that was never mounted the owner, mode and times of
    /// the uppermost layer's top: the kernel shows the upper's own.
    fn show_top_of_base(&self, own: BorrowedFd<'_>) -> io::Result<()> {
        let [top, ..] = &*self.lowers else { return Ok(()) };
        // The kernel makes it when it mounts.
        match statat(own, format!("{WORK}/work"), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
        let (base, upper) = (fstat(&top.mount)?, fstat(&self.upper)?);
        if (base.st_uid, base.st_gid) != (upper.st_uid, upper.st_gid) {
            let ids = (Uid::from_raw(base.st_uid), Gid::from_raw(base.st_gid));
            chownat(&self.upper, "", Some(ids.0), Some(ids.1), AtFlags::EMPTY_PATH)?;
        }
        if base.st_mode != upper.st_mode {
            chmodat(&self.own, UPPER, Mode::from_raw_mode(base.st_mode), AtFlags::empty())?;
        }
        let time = |seconds, nanoseconds: u64| Timespec {
            tv_sec: seconds,
            tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
        };
        let times = Timestamps {
            last_access: time(base.st_atime, base.st_atime_nsec),
            last_modification: time(base.st_mtime, base.st_mtime_nsec),
        };
        Ok(utimensat(&self.own, UPPER, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn stack(&self, options: OverlayOptions, volatile: bool) -> Result<OwnedFd, MountError> {
        let by_fd = |metacopy| {
            let layers = |context: &FsContext| {
                for layer in &self.lowers {
                    context.set_fd(if layer.data { "datadir+" } else { "lowerdir+" }, layer.mount.as_fd())?;
                }
                context.set_fd("upperdir", self.upper.as_fd())?;
                context.set_fd("workdir", self.work.as_fd())
            };
            configure(options, metacopy, volatile, layers)
        };
        let mut tried = by_fd(false);
        if tried.as_ref().is_err_and(layer::is_invalid) && self.has_content() && options.redirect_dir {
            // Linux before 6.16 follows a redirect to content with it alone.
            tried = by_fd(true);
        }
        match tried {
            // Linux before 6.13 takes no descriptor for a layer, and before
            // 6.15 no layer that is in no namespace.
            Err(error) if layer::is_invalid(&error) => self.stack_by_path(options, volatile),
            done => done,
        }
    }

    fn has_content(&self) -> bool {
        self.lowers.iter().any(|layer| layer.data)
    }

    /// For older kernels: layers attached in a mount namespace that nobody
    /// else sees, and named by their paths there, which are short.
    pub(super) fn stack_by_path(&self, options: OverlayOptions, volatile: bool) -> Result<OwnedFd, MountError> {
        layer::by_path(&self.lowers, Some(self.own.as_fd()), |lowerdir, own| {
            configure(options, self.has_content(), volatile, |context| {
                context.set("lowerdir", lowerdir)?;
                context.set("upperdir", &format!("{own}/{UPPER}"))?;
                context.set("workdir", &format!("{own}/{WORK}"))
            })
        })
    }
}

/// Takes away what a volatile mount leaves, which forbids to mount its remains.
/// Source: Linux `Documentation/filesystems/overlayfs.rst`, "Volatile mount".
pub(super) fn unmark_volatile(own: BorrowedFd<'_>) -> io::Result<()> {
    match statat(own, VOLATILE_MARK, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        found => found.map(drop)?,
    }
    for (inner, flags) in
        [("/volatile/dirty", AtFlags::empty()), ("/volatile", AtFlags::REMOVEDIR), ("", AtFlags::REMOVEDIR)]
    {
        match unlinkat(own, format!("{VOLATILE_MARK}{inner}"), flags) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn configure(
    options: OverlayOptions,
    metacopy: bool,
    volatile: bool,
    set_layers: impl Fn(&FsContext) -> Result<(), MountError>,
) -> Result<OwnedFd, MountError> {
    let context = FsContext::open("overlay")?;
    set_layers(&context)?;
    context.set("index", if options.index { "on" } else { "off" })?;
    if options.userxattr {
        context.set_flag("userxattr")?;
    } else {
        // A copy-up of metadata alone would let the upper depend on the lower
        // file's content for ever, by an attribute that is not verified.
        context.set("metacopy", if metacopy { "on" } else { "off" })?;
        context.set("redirect_dir", if options.redirect_dir { "on" } else { "nofollow" })?;
    }
    context.set("xino", "auto")?;
    if volatile {
        // No sync of the whole file system at unmount (up to 200 ms when
        // others have dirty pages), and nothing to keep it for.
        context.set_flag("volatile")?;
    }
    let mount = context.mount(Restrictions { nodev: true, ..Restrictions::default() })?;
    // When the work directory cannot be used, the kernel mounts for reading
    // only and says that in its log alone.
    let flags = fstatvfs(&mount).map_err(|e| MountError::new("look at an overlay", e.into()))?.f_flag;
    if flags.contains(StatVfsMountFlags::RDONLY) {
        return Err(MountError::new("mount an overlay for writing", Errno::ROFS.into()));
    }
    Ok(mount)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_testkit::{Need, privileged};

    use super::*;
    use std::{fs, os::fd::AsRawFd};

    #[test]
    fn layers_work_by_path_where_descriptors_do_not() {
        privileged(&[Need::Root, Need::Filesystem("overlay")], || {
            let dir = tempfile::tempdir().unwrap();
            for name in ["lower", UPPER, WORK] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            fs::write(dir.path().join("lower/f"), "from the image").unwrap();
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let lower = [Layer::Dir(dir.path().join("lower"))];
            let own = mount::open_dir_path(dir.path()).unwrap();
            let layers = Layers::new(&lower, own.as_fd(), None).unwrap();
            let mount = layers.stack_by_path(OverlayOptions::PRIVILEGED, false).unwrap();
            drop(layers);
            let at = format!("/proc/self/fd/{}", mount.as_raw_fd());
            assert_eq!(fs::read_to_string(format!("{at}/f")).unwrap(), "from the image");
            fs::write(format!("{at}/g"), "new").unwrap();
            assert_eq!(fs::read_to_string(dir.path().join("upper/g")).unwrap(), "new");
            assert!(!dir.path().join("lower/g").exists());
            assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
        });
    }
}
