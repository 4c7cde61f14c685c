//! Roots with a file system of their own each, in a file on a loop device.

pub(crate) mod disk;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use qvd_core::{Bytes, Missing, RootPolicy, Support};

use self::disk::{Shape, Templates};
use super::{
    BaseTree, Capabilities, Capability, Deviation, Place, Quota, Root, RootBackend, RootId, RootOptions, exclusive,
    record::{self, Record},
};
use crate::{Error, fsio, probe};

/// Roots whose writable layer is an ext4 of its own: hard limits in bytes and
/// inodes on hosts without quotas.
///
/// The file system lies in a sparse file, copied from a template that is made
/// once for each size, so that making a root takes the same time whatever the
/// size of the base. The base itself is shared as with overlayfs, memory
/// included. What a root may hold includes what its file system needs for
/// itself, a few hundredths.
///
/// A host has as many loop devices as its kernel allows (`loop.max_loop`), and
/// each running root needs one.
#[derive(Debug)]
pub struct Looped {
    place: Place,
    templates: Templates,
}

/// Bytes of a root that nobody limits; sparse, so it takes what is written.
pub(crate) const UNLIMITED: Bytes = Bytes::gib(16);

/// The file system of a root, in its directory.
const DISK: &str = "disk";

impl Looped {
    /// Roots in this place.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { templates: Templates::new(place.clone()), place }
    }

    fn dir(&self, id: &RootId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    /// Makes a root beside its place and renames it there: it is whole or absent.
    fn make(&self, id: &RootId, shape: Shape, record: Option<&Record>) -> Result<(), Error> {
        let dir = self.dir(id);
        let io = |op| Error::io(op, &dir);
        let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(self.place.dir()).map_err(io("make root"))?;
        // Its own cleaning up would keep the caller waiting.
        let scratch = scratch.keep();
        let fill = || {
            let disk = self.templates.copy(shape, &scratch.join(DISK))?;
            if let Some(record) = record {
                record.write(&scratch)?;
                disk.sync_all().map_err(io("make root"))?;
            }
            std::fs::rename(&scratch, &dir).map_err(io("make root"))?;
            if record.is_some() {
                fsio::sync_dir(self.place.dir()).map_err(io("make root"))?;
            }
            Ok(())
        };
        fill().inspect_err(|_| {
            if let Err(error) = self.place.discard(&scratch) {
                tracing::warn!(path = %scratch.display(), %error, "part of a root left behind until the next start");
            }
        })
    }

    /// Tries everything on a small disk that is gone afterwards.
    fn probe(&self) -> Result<Support, Error> {
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(self.place.dir());
        let scratch = scratch.map_err(Error::io("probe loop devices below", self.place.dir()))?;
        let tried = || {
            let disk = scratch.path().join(DISK);
            self.templates.copy(Shape::SMALLEST, &disk)?;
            let own = disk::mount(&disk)?;
            exclusive::probe_on(scratch.path(), own.as_fd())
        };
        match tried() {
            Ok(support) => Ok(support),
            Err(Error::Unsupported { missing, .. }) => Ok(Support::No(missing)),
            Err(error) => Err(error),
        }
    }
}

impl RootBackend for Looped {
    fn name(&self) -> &'static str {
        "loop"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let mut found = Capabilities::new();
        let works = self.probe()?;
        for capability in Capability::ALL {
            found.set(capability, works.clone());
        }
        let id_mapped = match (&works, probe::userns()) {
            (Support::No(_), _) => works,
            (_, Ok(_)) => probe::bind(self.place.dir(), true)?,
            (_, Err(missing)) => Support::No(missing),
        };
        found
            .set(Capability::IdMapped, id_mapped)
            .set(
                Capability::Snapshots,
                Support::No(Missing::Design("a file system in use cannot be copied as a file".to_owned())),
            )
            .set(
                Capability::Unprivileged,
                Support::No(Missing::Privilege("use loop devices and mount what is on them".to_owned())),
            );
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        // Those of the overlay that its file system is the upper layer of.
        use Deviation as D;
        &[D::StaleMaps, D::FrozenAccessTimes, D::FilledHoles]
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        let dir = self.dir(id);
        let shape = Shape::new(options)?;
        let had = record::find(&self.place, id)?;
        let fresh = match (had, options.policy) {
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                let had = Record::read(&dir)?.ok_or_else(|| Error::NoSuchRoot(id.clone()))?;
                had.expect_base(id, base)?;
                if had.quota != options.quota {
                    let missing = Missing::Design("a root's file system keeps the size it was made with".to_owned());
                    return Err(Error::Unsupported { op: "change the limits of a root", missing });
                }
                false
            }
            // What runs keeps its disk; the next mount takes the new limits.
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => false,
            (had, policy) => {
                if had.is_some() {
                    self.remove(id)?;
                }
                let record = (policy == RootPolicy::Persistent).then(|| Record::new(base, options));
                self.make(id, shape, record.as_ref())?;
                true
            }
        };
        Ok(Box::new(Disk {
            id: id.clone(),
            base: base.clone(),
            shape,
            policy: options.policy,
            back: Self::new(self.place.clone()),
            fresh: AtomicBool::new(fresh),
            closed: false,
        }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.dir(id);
        expect_unused(id, &dir)?;
        self.place.discard(&dir)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }
}

fn expect_unused(id: &RootId, dir: &Path) -> Result<(), Error> {
    if disk::in_use(&dir.join(DISK))? { Err(Error::RootBusy(id.clone())) } else { Ok(()) }
}

#[derive(Debug)]
struct Disk {
    id: RootId,
    base: BaseTree,
    shape: Shape,
    policy: RootPolicy,
    back: Looped,
    /// Just made and not mounted yet: it is as its base.
    fresh: AtomicBool,
    closed: bool,
}

impl Root for Disk {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let dir = self.back.dir(&self.id);
        expect_unused(&self.id, &dir)?;
        let volatile = self.policy == RootPolicy::Volatile;
        if volatile && !self.fresh.swap(false, Ordering::Relaxed) {
            self.back.place.discard(&dir)?;
            self.back.make(&self.id, self.shape, None)?;
        }
        let own = disk::mount(&dir.join(DISK))?;
        exclusive::mount(&self.id, self.base.layers(), own.as_fd(), idmap, volatile)
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.policy == RootPolicy::Volatile {
            self.back.remove(&self.id)?;
        }
        self.closed = true;
        Ok(())
    }
}

impl Shape {
    /// What a root's disk has to be, for what it may hold.
    fn new(options: &RootOptions) -> Result<Self, Error> {
        let Quota { bytes, inodes } = options.quota;
        let bytes = bytes.unwrap_or(UNLIMITED);
        if bytes < Self::SMALLEST.bytes {
            let missing = Missing::Design(format!("a root's file system has at least {}", Self::SMALLEST.bytes));
            return Err(Error::Unsupported { op: "limit a root", missing });
        }
        Ok(Self { bytes, inodes, journal: options.policy == RootPolicy::Persistent })
    }
}
