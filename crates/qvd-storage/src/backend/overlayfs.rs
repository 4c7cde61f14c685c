//! Roots by overlayfs: constant time, constant space, and one page cache for
//! all desktops of an image.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::{Missing, RootPolicy, Support};
use qvd_sys::mount::{self, FsContext, MountError, Restrictions};
use rustix::{
    fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, fstatvfs, mkdirat, openat},
    io::Errno,
};

use crate::{
    Error,
    backend::{
        BaseTree, Capabilities, Capability, Deviation, Place, Root, RootBackend, RootId, RootOptions,
        record::{self, Record},
    },
    fsio, probe,
    trash::Trash,
};

/// Roots made of an upper directory on a base tree.
///
/// On disk nothing is shifted: base, upper and home hold the ids that exist
/// inside, and each mount shows them in its desktop's range.
#[derive(Debug)]
pub struct Overlayfs {
    place: Place,
}

const UPPER: &str = "upper";
const WORK: &str = "work";

impl Overlayfs {
    /// Roots in this place.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self { place }
    }
}

impl RootBackend for Overlayfs {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let io = |error: io::Error| Error::io("probe overlayfs below", self.place.dir())(error);
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(self.place.dir()).map_err(io)?;
        for name in ["lower", UPPER, WORK] {
            fs::create_dir(scratch.path().join(name)).map_err(io)?;
        }
        let layers = |idmap: Option<BorrowedFd<'_>>, volatile| {
            let lower = mount::open_dir_path(&scratch.path().join("lower")).map_err(io)?;
            let own = mount::open_dir_path(scratch.path()).map_err(io)?;
            match mount_overlay(lower.as_fd(), own.as_fd(), idmap, volatile) {
                Ok(_mount) => Ok(Support::Yes),
                Err(error) => support(&error, self.place.dir()),
            }
        };
        let mut found = Capabilities::new();
        found.set(Capability::Roots, layers(None, false)?);
        let id_mapped = match probe::userns() {
            Ok(userns) => layers(Some(userns.as_fd()), false)?,
            Err(missing) => Support::No(missing),
        };
        found.set(Capability::IdMapped, id_mapped).set(Capability::Volatile, layers(None, true)?);
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        &[Deviation::StaleReaders, Deviation::StaleMaps, Deviation::WritableText, Deviation::FrozenAccessTimes]
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        let policy = options.policy;
        if !options.quota.is_unlimited() {
            let missing = Missing::Filesystem("quotas for directories".to_owned());
            return Err(Error::Unsupported { op: "limit roots", missing });
        }
        let dir = self.place.dir().join(id.as_str());
        let io = |op| Error::io(op, &dir);
        fsio::ensure_private_dir(&dir).map_err(io("make root"))?;
        let had = Record::read(&dir)?;
        match (had, policy) {
            (None, RootPolicy::Volatile) => note_base(&dir, whole(base)?).map_err(io("make root"))?,
            (Some(had), RootPolicy::Persistent) => {
                had.expect_base(id, base)?;
                note_base(&dir, whole(base)?).map_err(io("make root"))?;
            }
            (_, policy) => {
                // What another policy left is not what this one promises: a
                // volatile upper may lack anything after a crash.
                check_unused(id, &dir, self.place.trash())?;
                self.place.discard(&dir)?;
                fsio::ensure_private_dir(&dir).map_err(io("make root"))?;
                note_base(&dir, whole(base)?).map_err(io("make root"))?;
                if policy == RootPolicy::Persistent {
                    Record::new(base, options).write(&dir)?;
                }
            }
        }
        let base = whole(base)?.to_path_buf();
        Ok(Box::new(Overlay { id: id.clone(), dir, base, policy, place: self.place.clone(), closed: false }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.place.dir().join(id.as_str());
        check_unused(id, &dir, self.place.trash())?;
        self.place.discard(&dir)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }
}

/// The directory of a base that is one.
fn whole(base: &BaseTree) -> Result<&Path, Error> {
    base.dir().ok_or_else(|| Error::Unsupported {
        op: "make a root",
        missing: Missing::Design("a base of several layers".to_owned()),
    })
}

/// A link to the base. A link is made whole or not at all without a sync.
const BASE: &str = "base";

fn note_base(dir: &Path, base: &Path) -> io::Result<()> {
    let link = dir.join(BASE);
    if fs::read_link(&link).is_ok_and(|noted| noted == base) {
        return Ok(());
    }
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(base, link)
}

#[derive(Debug)]
struct Overlay {
    id: RootId,
    dir: PathBuf,
    base: PathBuf,
    policy: RootPolicy,
    place: Place,
    closed: bool,
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
        let lower = mount::open_dir_path(&self.base).map_err(Error::io("open image", &self.base))?;
        mount_overlay(lower.as_fd(), own.as_fd(), idmap, volatile).map_err(|error| {
            match (Errno::from_io_error(error.io()), support(&error, &self.dir)) {
                (Some(Errno::BUSY), _) => Error::RootBusy(self.id.clone()),
                (_, Ok(Support::No(missing))) => Error::Unsupported { op: "mount roots", missing },
                _ => Error::Mount { what: format!("root {}", self.id), source: error },
            }
        })
    }

    fn close(&mut self) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        if self.policy == RootPolicy::Volatile {
            check_unused(&self.id, &self.dir, self.place.trash())?;
            self.place.discard(&self.dir)?;
        }
        self.closed = true;
        Ok(())
    }
}

impl Overlay {
    /// Throws away what was written so far, if nobody is using it.
    fn retire(&self) -> Result<(), Error> {
        check_unused(&self.id, &self.dir, self.place.trash())?;
        self.place.discard(&self.dir.join(UPPER))?;
        self.place.discard(&self.dir.join(WORK))
    }
}

/// Asks the kernel whether a root is mounted anywhere, in whatever process
/// and mount namespace, by trying to mount it: `index=on` makes that exclusive.
fn check_unused(id: &RootId, dir: &Path, trash: &Trash) -> Result<(), Error> {
    let own = match mount::open_dir_path(dir) {
        Ok(own) => own,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("open root", dir)(error)),
    };
    for name in [UPPER, WORK] {
        match rustix::fs::statat(&own, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => {}
            // Nothing can have mounted half a root.
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(Error::io("read root", dir)(error)),
        }
    }
    clear_volatile_marker(&own, trash).map_err(Error::io("clean root", dir))?;
    // On another base the kernel would refuse and complain in its log, after
    // it has answered the question; that is the way out when the base is gone.
    let base = fs::read_link(dir.join(BASE)).and_then(|base| mount::open_dir_path(&base)).ok();
    // Volatile, or else its end would sync the whole file system.
    let tried = mount_overlay(base.as_ref().unwrap_or(&own).as_fd(), own.as_fd(), None, true);
    match tried {
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::BUSY) => Err(Error::RootBusy(id.clone())),
        Ok(_) | Err(_) => clear_volatile_marker(&own, trash).map_err(Error::io("clean root", dir)),
    }
}

/// Takes away what a volatile mount leaves, which forbids to mount its remains.
/// Source: Linux `Documentation/filesystems/overlayfs.rst`, "Volatile mount".
fn clear_volatile_marker(own: impl AsFd, trash: &Trash) -> io::Result<()> {
    trash.discard_at(own, "work/work/incompat")
}

/// Stacks `own/upper` on `lower` and returns the detached mount.
fn mount_overlay(
    lower: BorrowedFd<'_>,
    own: BorrowedFd<'_>,
    idmap: Option<BorrowedFd<'_>>,
    volatile: bool,
) -> Result<OwnedFd, MountError> {
    let layers = Layers::new(lower, own, idmap).map_err(|e| MountError::new("clone the layers of an overlay", e))?;
    let stack = || match layers.stack(Index::On, volatile) {
        // The layers' file handles changed, as when a store was copied to
        // another disk. Content is verified by digest, not by handle; only
        // hard links made before lose their common identity.
        Err(error) if Errno::from_io_error(error.io()) == Some(Errno::STALE) => {
            tracing::warn!(%error, "layers were copied since; mounting without index");
            layers.stack(Index::Off, volatile)
        }
        done => done,
    };
    // What the map makes of root, whose the upper is on disk.
    let root = rustix::fs::fstat(&layers.upper).map_err(|e| MountError::new("read the upper layer", e.into()))?;
    match idmap {
        None => stack(),
        Some(_) => mount::with_fs_ids(root.st_uid, root.st_gid, stack)
            .map_err(|e| MountError::new("become root of the id map", e))
            .flatten(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Index {
    On,
    Off,
}

struct Layers {
    lower: OwnedFd,
    own: OwnedFd,
    upper: OwnedFd,
    work: OwnedFd,
}

impl Layers {
    fn new(lower: BorrowedFd<'_>, own: BorrowedFd<'_>, idmap: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let lower = mount::clone_dir(lower)?;
        mount::restrict(
            lower.as_fd(),
            Restrictions { read_only: true, nodev: true, ..Restrictions::default() },
            idmap,
        )?;
        // One mount for upper and work: overlayfs asks for that.
        let own = mount::clone_dir(own)?;
        mount::restrict(own.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let upper = openat(&own, UPPER, flags, Mode::empty())?;
        let work = openat(&own, WORK, flags, Mode::empty())?;
        Ok(Self { lower, own, upper, work })
    }

    fn stack(&self, index: Index, volatile: bool) -> Result<OwnedFd, MountError> {
        let by_fd = self.configure(index, volatile, |context, key, fd| context.set_fd(key, fd));
        match by_fd {
            // Linux before 6.13 takes no descriptor for a layer, and before
            // 6.15 no layer that is in no namespace.
            Err(error) if error.io().kind() == io::ErrorKind::InvalidInput => self.stack_by_path(index, volatile),
            done => done,
        }
    }

    /// For older kernels: layers attached in a mount namespace that nobody
    /// else sees, and named by the paths of their descriptors.
    fn stack_by_path(&self, index: Index, volatile: bool) -> Result<OwnedFd, MountError> {
        let attached = || -> io::Result<()> {
            // Any two directories can be covered: the namespace is ours alone.
            mount::attach(self.lower.as_fd(), mount::open_dir_path(Path::new("/sys"))?.as_fd())?;
            mount::attach(self.own.as_fd(), mount::open_dir_path(Path::new("/dev"))?.as_fd())
        };
        let by_path = || {
            attached().map_err(|e| MountError::new("attach the layers of an overlay", e))?;
            self.configure(index, volatile, |context, key, fd| {
                // `lowerdir+` came with Linux 6.8; there is only one lower here.
                context.set(key.trim_end_matches('+'), &format!("/proc/self/fd/{}", fd.as_raw_fd()))
            })
        };
        mount::in_private_namespace(by_path).map_err(|e| MountError::new("make a private mount namespace", e)).flatten()
    }

    fn configure(
        &self,
        index: Index,
        volatile: bool,
        set_layer: impl Fn(&FsContext, &str, BorrowedFd<'_>) -> Result<(), MountError>,
    ) -> Result<OwnedFd, MountError> {
        let context = FsContext::open("overlay")?;
        set_layer(&context, "lowerdir+", self.lower.as_fd())?;
        set_layer(&context, "upperdir", self.upper.as_fd())?;
        set_layer(&context, "workdir", self.work.as_fd())?;
        // Exclusive: a root that is still mounted cannot be mounted or deleted
        // by mistake. Hard links of the image stay one file after a copy-up.
        context.set("index", if index == Index::On { "on" } else { "off" })?;
        // A copy-up of metadata alone would let the upper depend on the lower
        // file's content for ever, by an attribute that is not verified.
        context.set("metacopy", "off")?;
        // Renaming a directory of the image works. Only root outside can set
        // the attribute that this follows.
        context.set("redirect_dir", "on")?;
        // All layers are on one file system, so inode numbers are unique already.
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
}

/// What an error says about the host; an error that says nothing stays one.
fn support(error: &MountError, dir: &Path) -> Result<Support, Error> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use qvd_testkit::{Need, privileged};

    use super::*;

    #[test]
    fn layers_work_by_path_where_descriptors_do_not() {
        privileged(&[Need::Root, Need::Filesystem("overlay")], || {
            let dir = tempfile::tempdir().unwrap();
            for name in ["lower", UPPER, WORK] {
                fs::create_dir(dir.path().join(name)).unwrap();
            }
            fs::write(dir.path().join("lower/f"), "from the image").unwrap();
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let lower = mount::open_dir_path(&dir.path().join("lower")).unwrap();
            let own = mount::open_dir_path(dir.path()).unwrap();
            let layers = Layers::new(lower.as_fd(), own.as_fd(), None).unwrap();
            let mount = layers.stack_by_path(Index::On, false).unwrap();
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
