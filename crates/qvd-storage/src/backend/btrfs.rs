//! Roots as btrfs snapshots.

mod stream;
mod volumes;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use qvd_core::{Bytes, Digest, Missing, RootPolicy, Support};
use qvd_sys::btrfs;

use self::volumes::Volumes;
pub(crate) use self::volumes::delete_at;
use super::{
    BaseTree, Capabilities, Capability, Deviation, Place, Quota, Root, RootBackend, RootId, RootOptions, Snapshots,
    exclusive,
    record::{self, Record},
};
use crate::{Error, fsio, probe};

/// Roots made as snapshots of a read-only subvolume, which a base is copied to
/// once. Making one waits for the file system's transaction, some
/// milliseconds; removing one returns at once and the kernel frees its space
/// later. Roots share blocks on disk but, unlike with overlayfs, no memory.
///
/// A root is not shown as the subvolume that it is: an overlay without anything
/// below lies on it. So a desktop cannot make subvolumes of its own, with
/// which it would escape its quota and hinder its removal, and the kernel
/// knows whether a root is in use.
///
/// # Quotas
///
/// They hold where quotas are switched on, best the simple kind:
/// [`Btrfs::enable_simple_quota`]. What is charged is who wrote an extent first, so
/// a root that overwrites part of a large extent pays for both until the whole
/// extent is rewritten. What a root wrote stays charged to it while a snapshot
/// of it keeps that. Files are not counted: btrfs has no limit for them, but their
/// metadata are charged as bytes.
#[derive(Debug)]
pub struct Btrfs {
    volumes: Volumes,
}

impl Btrfs {
    /// Roots in this place, which has to be on a btrfs.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { volumes: Volumes::new(place) }
    }

    /// Switches simple quotas on for the whole file system of the place, on
    /// which the administrator decides: it needs Linux 6.7 from then on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on an older kernel or another file system.
    pub fn enable_simple_quota(&self) -> Result<(), Error> {
        let dir = self.volumes.open_place()?;
        btrfs::enable_simple_quota(dir.as_fd()).map_err(|error| self.volumes.explain("switch quotas on", error))
    }

    fn kept(&self, id: &RootId) -> Result<Record, Error> {
        Record::read(&self.volumes.dir(id))?.ok_or_else(|| Error::NoSuchRoot(id.clone()))
    }

    fn expect_absent(&self, id: &RootId) -> Result<(), Error> {
        match record::find(&self.volumes.place, id)? {
            None => Ok(()),
            Some(_) => Err(Error::RootExists(id.clone())),
        }
    }

    /// Tries everything on a subvolume that is gone afterwards.
    fn probe(&self) -> Result<Probed, Error> {
        let (volumes, place) = (&self.volumes, &self.volumes.place);
        let dir = volumes.open_place()?;
        if !btrfs::is_btrfs(dir.as_fd()).map_err(Error::io("probe", place.dir()))? {
            return Ok(Err(volumes::not_btrfs()));
        }
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(place.dir());
        let scratch = scratch.map_err(Error::io("probe btrfs below", place.dir()))?;
        let (one, other) = (scratch.path().join("one"), scratch.path().join("other"));
        let tried = (|| {
            volumes.subvolume(&one)?;
            let own = fsio::open_dir(&one).map_err(Error::io("probe", &one))?;
            exclusive::prepare(&own, &one)?;
            volumes.copy(own.as_fd(), &other, false)?;
            let mounted = exclusive::probe(&other, None, true)?;
            let id_mapped = match probe::userns() {
                Ok(userns) => exclusive::probe(&one, Some(userns.as_fd()), false)?,
                Err(missing) => Support::No(missing),
            };
            // Any limit will do to see whether there are limits.
            let quota = match volumes.limit(&one, Quota { bytes: Some(Bytes::mib(1)), inodes: None }) {
                Ok(()) => Support::Yes,
                Err(Error::Unsupported { missing, .. }) => Support::No(missing),
                Err(error) => return Err(error),
            };
            Ok([mounted, id_mapped, quota])
        })();
        let removed = volumes.delete(&one).and_then(|()| volumes.delete(&other));
        match tried {
            Ok(answers) => removed.map(|()| Ok(answers)),
            Err(Error::Unsupported { missing, .. }) => Ok(Err(missing)),
            Err(error) => Err(error),
        }
    }
}

/// Whether roots work, with an id map, with a quota; or why nothing does.
type Probed = Result<[Support; 3], Missing>;

impl RootBackend for Btrfs {
    fn name(&self) -> &'static str {
        "btrfs"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let mut found = Capabilities::new();
        let probed = self.probe()?;
        let works = match &probed {
            Ok([mounted, ..]) => mounted.clone(),
            Err(missing) => Support::No(missing.clone()),
        };
        for capability in [
            Capability::Roots,
            Capability::Volatile,
            Capability::Durable,
            Capability::Snapshots,
            Capability::ConstantCreate,
            Capability::ConstantDelete,
        ] {
            found.set(capability, works.clone());
        }
        let [_, id_mapped, quota] = probed.unwrap_or_else(|missing| {
            let no = Support::No(missing);
            [no.clone(), no.clone(), no]
        });
        let own = || Support::No(Missing::Design("each snapshot has a page cache of its own".to_owned()));
        found
            .set(Capability::IdMapped, id_mapped)
            .set(Capability::QuotaBytes, quota)
            .set(Capability::QuotaInodes, Support::No(volumes::no_inodes()))
            .set(Capability::SharedCache, own())
            .set(Capability::SharedMmaps, own())
            .set(
                Capability::Unprivileged,
                Support::No(Missing::Privilege("remove subvolumes and mount overlays on them".to_owned())),
            );
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        &[]
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        if options.quota.inodes.is_some() {
            return Err(Error::Unsupported { op: "limit roots", missing: volumes::no_inodes() });
        }
        let (volumes, dir) = (&self.volumes, self.volumes.dir(id));
        let had = record::find(&volumes.place, id)?;
        let fresh = match (had, options.policy) {
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => false,
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                let had = self.kept(id)?;
                had.expect_base(id, base)?;
                let now = Record::new(base, options);
                if had != now {
                    now.write(&dir)?;
                }
                false
            }
            (had, policy) => {
                if had.is_some() {
                    self.remove(id)?;
                }
                let record = (policy == RootPolicy::Persistent).then(|| Record::new(base, options));
                volumes.make(volumes.base(base)?.as_fd(), id, record.as_ref())?;
                true
            }
        };
        if let Err(error) = volumes.limit(&dir, options.quota) {
            if fresh && let Err(error) = volumes.delete(&dir) {
                tracing::warn!(root = %id, %error, "root without its limit left behind");
            }
            return Err(error);
        }
        Ok(Box::new(Snapshot {
            id: id.clone(),
            base: base.clone(),
            options: *options,
            volumes: volumes.clone(),
            fresh: AtomicBool::new(fresh),
            closed: false,
        }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.volumes.dir(id);
        exclusive::check_before_removal(id, &dir, self.volumes.place.trash())?;
        self.volumes.delete(&dir)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.volumes.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.volumes.place, id)
    }

    fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        self.volumes.forget_bases(gone)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}

impl Snapshots for Btrfs {
    fn snapshot(&self, of: &RootId, to: &RootId) -> Result<(), Error> {
        let record = Record { quota: Quota::default(), ..self.kept(of)? };
        self.expect_absent(to)?;
        let dir = self.volumes.dir(of);
        let own = fsio::open_dir(&dir).map_err(Error::io("copy root", &dir))?;
        self.volumes.make(own.as_fd(), to, Some(&record))
    }
}

#[derive(Debug)]
struct Snapshot {
    id: RootId,
    base: BaseTree,
    options: RootOptions,
    volumes: Volumes,
    /// Just made and not mounted yet: it is as its base.
    fresh: AtomicBool,
    closed: bool,
}

impl Root for Snapshot {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        let volatile = self.options.policy == RootPolicy::Volatile;
        if volatile && !self.fresh.swap(false, Ordering::Relaxed) {
            self.volumes.renew(&self.base, &self.id, self.options.quota)?;
        }
        exclusive::mount_alone(&self.id, &self.volumes.dir(&self.id), idmap, volatile)
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.options.policy == RootPolicy::Volatile {
            let dir = self.volumes.dir(&self.id);
            exclusive::check_before_removal(&self.id, &dir, self.volumes.place.trash())?;
            self.volumes.delete(&dir)?;
        }
        self.closed = true;
        Ok(())
    }
}
