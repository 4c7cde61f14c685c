//! Roots that are copies of their base: whole ones, plain or sharing extents,
//! or of those parts alone that are written to.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use qvd_core::{Missing, RootPolicy, Support};
use qvd_sys::mount::{self, MountError, Restrictions};

use super::{
    BaseTree, Capabilities, Capability, Deviation, Place, Root, RootBackend, RootId, RootOptions,
    bound::Parts,
    record::{self, Record},
};
use crate::{
    Error,
    copytree::{Content, copy_tree},
    fsio, probe,
};

/// Roots that are copies, byte for byte: they work on every file system, and
/// everything else is measured against them.
#[derive(Debug)]
pub struct PlainCopy(Copies);

/// Roots that are copies whose files share their extents with the base until
/// they are written: on XFS and btrfs. They cost time by the number of files,
/// little space, and no memory is shared.
#[derive(Debug)]
pub struct Reflink(Copies);

/// Roots in which the directories that are written to are copies, and all
/// else is bound from the base, for reading: what one unpacks and binds by hand.
///
/// Which these are, the image says in `/usr/share/qvd/bind.toml`
/// (`writable = ["/etc", "/var"]`); otherwise `/etc`, `/home`, `/opt`, `/root`,
/// `/srv` and `/var`. It works on every kernel that can bind mounts, and shares all
/// memory of the rest; but an image has to be made for it.
#[derive(Debug)]
pub struct Bind(Copies);

impl Bind {
    /// Roots in this place.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self(Copies { place, extent: Extent::Parts })
    }
}

impl PlainCopy {
    /// Roots in this place.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self(Copies { place, extent: Extent::Whole(Content::Copied) })
    }
}

impl Reflink {
    /// Roots in this place. Bases have to be on its file system.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self(Copies { place, extent: Extent::Whole(Content::Shared) })
    }
}

macro_rules! delegate {
    ($type:ident, $name:literal, $deviations:expr) => {
        impl RootBackend for $type {
            fn name(&self) -> &'static str {
                $name
            }
            fn capabilities(&self) -> Result<Capabilities, Error> {
                self.0.capabilities()
            }
            fn deviations(&self) -> &'static [Deviation] {
                $deviations
            }
            fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
                self.0.create(base, id, options)
            }
            fn remove(&self, id: &RootId) -> Result<(), Error> {
                self.0.place.discard(&self.0.place.dir().join(id.as_str()))
            }
            fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
                record::list(&self.0.place)
            }
            fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
                record::find(&self.0.place, id)
            }
        }
    };
}
delegate!(PlainCopy, "copy", &[Deviation::UnnoticedUse]);
delegate!(Reflink, "reflink", &[Deviation::UnnoticedUse]);
delegate!(Bind, "bind", &[Deviation::ReadOnlyParts, Deviation::UnnoticedUse]);

#[derive(Debug, Clone)]
struct Copies {
    place: Place,
    extent: Extent,
}

/// How much of a base is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole(Content),
    Parts,
}

/// The files of a root, in its directory.
const TREE: &str = "tree";
/// A volatile root that was mounted once; it begins anew the next time.
const USED: &str = "used";

impl Copies {
    fn capabilities(&self) -> Result<Capabilities, Error> {
        let dir = self.place.dir();
        let roots = match self.extent {
            Extent::Whole(Content::Shared) => probe::reflink(dir).map_err(Error::io("probe reflink below", dir))?,
            _ => Support::Yes,
        };
        let (copied, shared) = match self.extent {
            Extent::Whole(_) => (
                "every file of the base is copied",
                Support::No(Missing::Design("each root has files of its own".to_owned())),
            ),
            Extent::Parts => ("every file that may be written is copied", Support::Yes),
        };
        let whole = || Support::No(Missing::Design(copied.to_owned()));
        let quota = || {
            Support::No(Missing::Filesystem("quotas that count a copy of the base; use `loop` for limits".to_owned()))
        };
        let mut found = Capabilities::new();
        if roots.is_yes() {
            let attached = probe::bind(dir, false)?;
            found.set(Capability::Roots, attached.clone()).set(Capability::IdMapped, probe::bind(dir, true)?);
            found.set(Capability::Volatile, Support::Yes).set(Capability::Durable, attached);
        } else {
            for capability in [Capability::Roots, Capability::IdMapped, Capability::Volatile, Capability::Durable] {
                found.set(capability, roots.clone());
            }
        }
        found
            .set(Capability::Snapshots, whole())
            .set(Capability::QuotaBytes, quota())
            .set(Capability::QuotaInodes, quota())
            .set(Capability::SharedCache, shared.clone())
            .set(Capability::SharedMmaps, shared)
            .set(Capability::ConstantCreate, whole())
            .set(Capability::ConstantDelete, Support::Yes)
            .set(
                Capability::Unprivileged,
                Support::No(Missing::Privilege("give files of a copy to their owners".to_owned())),
            );
        Ok(found)
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        if !options.quota.is_unlimited() {
            let missing = Missing::Filesystem("quotas that count a copy of the base; use `loop` for limits".to_owned());
            return Err(Error::Unsupported { op: "limit roots", missing });
        }
        let dir = self.place.dir().join(id.as_str());
        let had = record::find(&self.place, id)?;
        match (had, options.policy) {
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => {}
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                if let Some(record) = Record::read(&dir)? {
                    record.expect_base(id, base)?;
                }
            }
            (had, policy) => {
                if had.is_some() {
                    self.place.discard(&dir)?;
                }
                self.make(base, &dir, options, policy)?;
            }
        }
        let root =
            Copied { id: id.clone(), dir, base: base.clone(), options: *options, copies: self.clone(), closed: false };
        Ok(Box::new(root))
    }

    /// Copies beside the root's place and renames it there: it is whole or absent.
    fn make(&self, base: &BaseTree, dir: &Path, options: &RootOptions, policy: RootPolicy) -> Result<(), Error> {
        let io = |op| Error::io(op, dir);
        let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(self.place.dir()).map_err(io("make root"))?;
        // Its own cleaning up would keep the caller waiting.
        let scratch = scratch.keep();
        let fill = || {
            let tree = scratch.join(TREE);
            fs::create_dir(&tree).map_err(io("make root"))?;
            let from = base.open()?;
            let to = fsio::open_dir(&tree).map_err(io("make root"))?;
            match self.extent {
                Extent::Whole(content) => {
                    copy_tree(base.path(), from.as_fd(), to.as_fd(), content).map_err(|error| self.explain(error))?
                }
                Extent::Parts => Parts::of(base, from.as_fd())?.copy(base, from.as_fd(), &tree)?,
            }
            if policy == RootPolicy::Persistent {
                Record::new(base, options).write(&scratch)?;
                rustix::fs::syncfs(&to).map_err(Error::io("make root", dir))?;
            }
            fs::rename(&scratch, dir).map_err(io("make root"))?;
            if policy == RootPolicy::Persistent {
                fsio::sync_dir(self.place.dir()).map_err(io("make root"))?;
            }
            Ok(())
        };
        fill().inspect_err(|_| {
            if let Err(error) = self.place.discard(&scratch) {
                tracing::warn!(path = %scratch.display(), %error, "copy left behind until the next start");
            }
        })
    }

    /// What a refusal to share extents says about the host.
    fn explain(&self, error: Error) -> Error {
        let unsupported = match &error {
            Error::Io { source, .. } => matches!(
                rustix::io::Errno::from_io_error(source),
                Some(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::XDEV | rustix::io::Errno::INVAL)
            ),
            _ => false,
        };
        if self.extent == Extent::Whole(Content::Shared) && unsupported {
            let missing = Missing::Filesystem("reflink from the base to the root".to_owned());
            return Error::Unsupported { op: "make roots", missing };
        }
        error
    }
}

#[derive(Debug)]
struct Copied {
    id: RootId,
    dir: PathBuf,
    base: BaseTree,
    options: RootOptions,
    copies: Copies,
    closed: bool,
}

impl Root for Copied {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        if self.options.policy == RootPolicy::Volatile {
            let used = self.dir.join(USED);
            if used.try_exists().map_err(Error::io("read root", &self.dir))? {
                self.copies.place.discard(&self.dir)?;
                self.copies.make(&self.base, &self.dir, &self.options, RootPolicy::Volatile)?;
            }
            fs::write(&used, "").map_err(Error::io("mark root", &self.dir))?;
        }
        let tree = self.dir.join(TREE);
        let mounted = match self.copies.extent {
            Extent::Whole(_) => {
                let dir = mount::open_dir_path(&tree).map_err(Error::io("open root", &tree))?;
                bind(dir.as_fd(), idmap).map_err(|error| MountError::new("bind and id-map its directory", error))
            }
            Extent::Parts => {
                let base = self.base.open()?;
                Parts::of(&self.base, base.as_fd())?.mount(base, &tree, idmap)
            }
        };
        mounted.map_err(|source| Error::Mount { what: format!("root {}", self.id), source })
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.options.policy == RootPolicy::Volatile {
            self.copies.place.discard(&self.dir)?;
        }
        self.closed = true;
        Ok(())
    }
}

/// A detached mount of a directory in which device nodes cannot be opened.
fn bind(dir: BorrowedFd<'_>, idmap: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let mount = mount::clone_dir(dir)?;
    mount::restrict(mount.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)?;
    Ok(mount)
}
