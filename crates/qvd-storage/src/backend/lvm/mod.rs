//! Roots as thin volumes of LVM.

mod tree;

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qvd_core::{Digest, Missing, RootPolicy, Support};

use super::{
    BaseTree, Capabilities, Capability, Deviation, Place, Quota, Root, RootBackend, RootId, RootOptions, Snapshots,
    record::{self, Record},
};
use crate::{
    Error,
    lvm::{self, Lookup, Making, Pool, Volume},
    probe,
};

/// How long the kernel may hold a device after it was unmounted: it writes back
/// what is left, and a full pool makes it try for a while.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

/// Roots as thin snapshots of a volume, which the files of a base are copied to
/// once, in the thin pool that an administrator gave by tagging it `qvd`.
///
/// A root is an ext4 of its own, without any overlay: what a program may expect
/// of a file system holds. Roots share blocks in the pool and, unlike with
/// overlayfs, no memory.
///
/// # Limits
///
/// They are the size and the inode table of the volume, so a root keeps those
/// that it was made with, and each pair of limits has a base of its own. The pool can fill up below them: nothing is made
/// any more when it nearly is, and [`Root::check`] says so. It has to refuse
/// writes when it is full (`lvchange --errorwhenfull y`): otherwise everybody
/// in it would hang.
///
/// # What stays
///
/// Bases (`qvd.tree.…`) are kept for roots to come, until
/// [`forget_bases`](RootBackend::forget_bases) says that they are of no more use. No root
/// depends on its base: one can be removed with `lvremove` at any time.
#[derive(Debug, Clone)]
pub struct Lvm {
    place: Place,
    lookup: Arc<Lookup>,
}

impl Lvm {
    /// Roots that have their directory in this place.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, lookup: Arc::default() }
    }

    fn dir(&self, id: &RootId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    fn kept(&self, id: &RootId) -> Result<Record, Error> {
        Record::read(&self.dir(id))?.ok_or_else(|| Error::NoSuchRoot(id.clone()))
    }

    /// Makes a root beside its place and renames it there: it is whole or absent.
    fn make(
        &self,
        id: &RootId,
        record: Option<&Record>,
        snapshot: impl FnOnce(&Pool, &Volume) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let pool = self.lookup.pool()?;
        let making = Making::begin(&self.place, &pool, &format!("root.{id}"))?;
        let made = snapshot(&pool, &making.volume).and_then(|()| record.map_or(Ok(()), |r| r.write(&making.dir)));
        match made {
            Ok(()) => making.finish(&self.place, &self.dir(id), record.is_some()),
            Err(error) => {
                making.give_up(&self.place);
                Err(error)
            }
        }
    }

    fn make_on(&self, base: &BaseTree, id: &RootId, quota: Quota, record: Option<&Record>) -> Result<(), Error> {
        self.make(id, record, |pool, to| {
            let fill = |volume: &Volume| tree::make_base(&self.place, pool, base, quota, volume);
            pool.snapshot_base((&self.place, base.digest(), tree::base_name(base, quota)), to, fill)
        })
    }

    /// Takes a root out of the way, if nobody has it mounted.
    fn discard(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.dir(id);
        if !dir.try_exists().map_err(Error::io("remove", &dir))? {
            return Ok(());
        }
        let volume = self.unused(id)?;
        lvm::discard(&self.place, &dir, &volume)
    }

    /// The volume of a root that nobody has mounted.
    fn unused(&self, id: &RootId) -> Result<Volume, Error> {
        let volume = Volume::of(&self.dir(id))?;
        if volume.in_use_after(CLOSED_WITHIN)? { Err(Error::RootBusy(id.clone())) } else { Ok(volume) }
    }

    /// Tries everything on a small base that is gone afterwards: whether roots
    /// work, and with an id map.
    fn probe(&self) -> Result<[Support; 2], Error> {
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(self.place.dir());
        let scratch = scratch.map_err(Error::io("probe thin volumes below", self.place.dir()))?;
        fs::write(scratch.path().join("file"), "").map_err(Error::io("probe thin volumes below", self.place.dir()))?;
        let tried = || {
            let pool = self.lookup.pool()?;
            let making = Making::begin(&self.place, &pool, "probe")?;
            // A base that no image can be, under a name that nobody else tries.
            let (name, digest) = (format!("{}.base", making.volume.name), Digest::new([0; 32]));
            let (base, volume) = (BaseTree::new(digest, scratch.path()), pool.sibling(name));
            let quota = Quota { bytes: Some(qvd_core::Bytes::mib(4)), inodes: None };
            let made = || {
                tree::make_base(&self.place, &pool, &base, quota, &volume)?;
                let snapshot = pool.snapshot(&volume, &making.volume);
                let removed = volume.remove();
                snapshot.and(removed)?;
                drop(tree::mount(&self.place, &making.volume, None, true)?);
                let Ok(userns) = probe::userns().map_err(Support::No) else {
                    return Ok(Support::No(Missing::Kernel("user namespaces".to_owned())));
                };
                match tree::mount(&self.place, &making.volume, Some(userns.as_fd()), true) {
                    Ok(_mount) => Ok(Support::Yes),
                    Err(Error::Unsupported { missing, .. }) => Ok(Support::No(missing)),
                    Err(error) => Err(error),
                }
            };
            let id_mapped = made();
            making.give_up(&self.place);
            id_mapped
        };
        match tried() {
            Ok(id_mapped) => Ok([Support::Yes, id_mapped]),
            Err(Error::Unsupported { missing, .. }) => Ok([Support::No(missing.clone()), Support::No(missing)]),
            Err(error) => Err(error),
        }
    }
}

impl RootBackend for Lvm {
    fn name(&self) -> &'static str {
        "lvm"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let [works, id_mapped] = self.probe()?;
        let mut found = Capabilities::new();
        for capability in Capability::ALL {
            found.set(capability, works.clone());
        }
        if works.is_yes() {
            let own = || Support::No(Missing::Design("each volume has a page cache of its own".to_owned()));
            let root = Support::No(Missing::Privilege("manage volumes and mount what is on them".to_owned()));
            found
                .set(Capability::IdMapped, id_mapped)
                .set(Capability::SharedCache, own())
                .set(Capability::SharedMmaps, own())
                .set(Capability::Unprivileged, root);
        }
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        &[]
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        let fresh = match (record::find(&self.place, id)?, options.policy) {
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                let had = self.kept(id)?;
                had.expect_base(id, base)?;
                if had.quota != options.quota {
                    let missing = Missing::Design("a root's volume keeps the limits it was made with".to_owned());
                    return Err(Error::Unsupported { op: "change the limits of a root", missing });
                }
                false
            }
            // What runs keeps its volume; the next mount takes the new limits.
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => false,
            (had, policy) => {
                if had.is_some() {
                    self.discard(id)?;
                }
                let record = (policy == RootPolicy::Persistent).then(|| Record::new(base, options));
                self.make_on(base, id, options.quota, record.as_ref())?;
                true
            }
        };
        Ok(Box::new(Thin {
            id: id.clone(),
            base: base.clone(),
            options: *options,
            back: self.clone(),
            fresh: AtomicBool::new(fresh),
            closed: false,
        }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        self.discard(id)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }

    fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        lvm::forget_bases(&self.place, gone)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

impl Snapshots for Lvm {
    /// Its limits are those of the original: both have a volume of that size.
    fn snapshot(&self, of: &RootId, to: &RootId) -> Result<(), Error> {
        let record = self.kept(of)?;
        if record::find(&self.place, to)?.is_some() {
            return Err(Error::RootExists(to.clone()));
        }
        let original = Volume::of(&self.dir(of))?;
        original.status()?;
        self.make(to, Some(&record), |pool, copy| pool.snapshot(&original, copy))
    }
}

#[derive(Debug)]
struct Thin {
    id: RootId,
    base: BaseTree,
    options: RootOptions,
    back: Lvm,
    /// Just made and not mounted yet: it is as its base.
    fresh: AtomicBool,
    closed: bool,
}

impl Root for Thin {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let volatile = self.options.policy == RootPolicy::Volatile;
        if volatile && !self.fresh.swap(false, Ordering::Relaxed) {
            self.back.discard(&self.id)?;
            self.back.make_on(&self.base, &self.id, self.options.quota, None)?;
        }
        let volume = self.back.unused(&self.id)?;
        volume.activate()?;
        tree::mount(&self.back.place, &volume, idmap, volatile)
    }

    fn check(&self) -> Result<(), Error> {
        self.back.lookup.pool()?.expect_room()
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.options.policy == RootPolicy::Volatile {
            self.back.discard(&self.id)?;
        }
        self.closed = true;
        Ok(())
    }
}
