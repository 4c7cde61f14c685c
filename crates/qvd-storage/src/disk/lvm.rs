//! Disks as thin volumes of LVM.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use qvd_core::{Bytes, Digest, Missing, RootPolicy, Support};

use super::{
    BaseDisk, Device, Disk, DiskBackend, DiskCapabilities, DiskCapability, DiskDeviation, DiskFormat, DiskId,
    DiskOptions, DiskReport, files,
    qcow2::{BackingPolicy, Chain},
    record::{self, Record},
};
use crate::{
    Error, Place,
    lvm::{self, Lookup, Making, Pool, Volume},
};

/// Disks as thin snapshots of a volume, which a base is copied to once, in the
/// thin pool that an administrator gave by tagging it `qvd`. Their sizes are
/// whole extents of its group, 4 MiB if nobody chose otherwise.
///
/// What is said of [`Lvm`](crate::Lvm) about pools that fill up, and about bases
/// (`qvd.disk.…`), holds here too.
#[derive(Debug, Clone)]
pub struct LvmDisks {
    place: Place,
    policy: BackingPolicy,
    lookup: Arc<Lookup>,
}

const SECTOR: u64 = 512;

/// What is read of a base at a time, and what of it is left out when it is zeros.
const COPIED_AT_ONCE: usize = 1 << 20;
const BLOCK: usize = 64 << 10;

impl LvmDisks {
    /// Disks that have their directory in this place, on bases that have no file
    /// behind them.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self::with_policy(place, BackingPolicy::nothing())
    }

    /// Disks that have their directory in this place, on bases that may have
    /// those files behind them that `policy` names.
    #[must_use]
    pub fn with_policy(place: Place, policy: BackingPolicy) -> Self {
        Self { place, policy, lookup: Arc::default() }
    }

    fn dir(&self, id: &DiskId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    /// Makes a disk beside its place and renames it there: it is whole or absent.
    fn make(&self, base: &BaseDisk, id: &DiskId, options: &DiskOptions) -> Result<(), Error> {
        let pool = self.lookup.pool()?;
        let bytes = Chain::open(base.path(), base.format(), &self.policy)?.size();
        let size = files::size_on(bytes, options.size)?;
        let making = Making::begin(&self.place, &pool, &format!("vm.{id}"))?;
        let kept = options.policy == RootPolicy::Persistent;
        let made = || {
            let digest = base.digest().hex();
            let name = format!("qvd.disk.{}", digest.get(..32).unwrap_or(&digest));
            let base_at = (&self.place, base.digest(), name);
            pool.snapshot_base(base_at, &making.volume, |volume| self.make_base(&pool, base, volume))?;
            if size > size_of_volume(&making.volume)? {
                making.volume.extend(size)?;
            }
            if kept { Record::new(base).write(&making.dir) } else { Ok(()) }
        };
        match made() {
            Ok(()) => making.finish(&self.place, &self.dir(id), kept),
            Err(error) => {
                making.give_up(&self.place);
                Err(error)
            }
        }
    }

    fn make_base(&self, pool: &Pool, base: &BaseDisk, to: &Volume) -> Result<(), Error> {
        let mut chain = Chain::open(base.path(), base.format(), &self.policy)?;
        let making = Making::begin(&self.place, pool, "new")?;
        let mut made = || {
            pool.create(&making.volume, chain.size().next_multiple_of(SECTOR))?;
            copy(&mut chain, &making.volume)?;
            Pool::name_base(&making.volume, to)
        };
        match made() {
            Ok(true) => fs::remove_dir_all(&making.dir).map_err(Error::io("make base", &making.dir)),
            other => {
                making.give_up(&self.place);
                other.map(drop)
            }
        }
    }

    /// The volume of a disk that nobody uses.
    fn unused(&self, id: &DiskId) -> Result<Volume, Error> {
        let volume = Volume::of(&self.dir(id))?;
        if volume.in_use()? { Err(Error::DiskBusy(id.clone())) } else { Ok(volume) }
    }

    fn discard(&self, id: &DiskId) -> Result<(), Error> {
        let dir = self.dir(id);
        if !dir.try_exists().map_err(Error::io("remove", &dir))? {
            return Ok(());
        }
        let volume = self.unused(id)?;
        lvm::discard(&self.place, &dir, &volume)
    }

    /// Makes a small volume and a snapshot of it, which are gone afterwards.
    fn probe(&self) -> Result<Support, Error> {
        let tried = || {
            let pool = self.lookup.pool()?;
            let (one, other) =
                (Making::begin(&self.place, &pool, "probe")?, Making::begin(&self.place, &pool, "probe"));
            let other = other.inspect_err(|_| one.give_up(&self.place))?;
            let made = pool.create(&one.volume, 4 << 20).and_then(|()| pool.snapshot(&one.volume, &other.volume));
            other.give_up(&self.place);
            one.give_up(&self.place);
            made
        };
        match tried() {
            Ok(()) => Ok(Support::Yes),
            Err(Error::Unsupported { missing, .. }) => Ok(Support::No(missing)),
            Err(error) => Err(error),
        }
    }
}

/// Writes what is in a disk to a new volume, but for zeros, which are there.
fn copy(chain: &mut Chain, to: &Volume) -> Result<(), Error> {
    let path = to.device();
    let device = File::options().write(true).open(&path).map_err(Error::io("open volume", &path))?;
    let mut buffer = vec![0; COPIED_AT_ONCE];
    let (mut at, size) = (0, chain.size());
    while at < size {
        let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..length).unwrap_or_default();
        chain.read_at(part, at)?;
        for (block, place) in part.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
            if block.iter().any(|byte| *byte != 0) {
                device.write_all_at(block, place).map_err(Error::io("copy disk to", &path))?;
            }
        }
        at += length as u64;
    }
    device.sync_all().map_err(Error::io("copy disk to", &path))
}

/// Gives back the whole blocks of a range, which then read as zeros, and
/// writes zeros to the rest of it.
fn discard(path: &Path, at: u64, length: u64) -> io::Result<()> {
    let device = File::options().write(true).open(path)?;
    let number = device.metadata()?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let granularity = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/discard_granularity"))?;
    // Nothing, where the pool ignores it.
    let granularity = granularity.trim().parse::<u64>().unwrap_or(0);
    let end = at + length;
    let (first, last) = match granularity {
        0 => (end, end),
        block => (at.next_multiple_of(block), end / block * block),
    };
    if first >= last {
        return files::write_zeros(&device, at, length);
    }
    files::write_zeros(&device, at, first - at)?;
    qvd_sys::blk::discard(device.as_fd(), first, last - first)?;
    files::write_zeros(&device, last, end - last)?;
    device.sync_all()
}

fn size_of_volume(volume: &Volume) -> Result<u64, Error> {
    volume.activate()?;
    Ok(volume.status()?.map_or(0, |status| status.sectors * SECTOR))
}

impl DiskBackend for LvmDisks {
    fn name(&self) -> &'static str {
        "lvm"
    }

    fn capabilities(&self) -> Result<DiskCapabilities, Error> {
        let works = self.probe()?;
        let mut found = DiskCapabilities::all(&works);
        if works.is_yes() {
            let no = |why: &str| Support::No(Missing::Design(why.to_owned()));
            found
                .set(DiskCapability::Commit, no("a base is shared by all who have the image"))
                .set(DiskCapability::Rebase, no("a snapshot does not know its base"))
                .set(DiskCapability::SharedCache, no("each volume has a page cache of its own"))
                .set(DiskCapability::Unprivileged, Support::No(Missing::Privilege("manage volumes".to_owned())));
        }
        Ok(found)
    }

    fn deviations(&self) -> &'static [DiskDeviation] {
        &[DiskDeviation::CoarseSizes]
    }

    fn create(&self, base: &BaseDisk, id: &DiskId, options: &DiskOptions) -> Result<Box<dyn Disk>, Error> {
        let fresh = match (record::find(&self.place, id)?, options.policy) {
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                if let Some(record) = Record::read(&self.dir(id))? {
                    record.expect_base(id, base)?;
                }
                let has = size_of_volume(&Volume::of(&self.dir(id))?)?;
                // Rounded up when it was made: so is what is asked for.
                if options.size.is_some_and(|size| size.get() > has) {
                    let why = "a kept disk keeps its size until it is made larger by a call for that".to_owned();
                    return Err(Error::Unsupported { op: "change the size of a disk", missing: Missing::Design(why) });
                }
                false
            }
            // What runs keeps its disk; the next attachment takes the new size.
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => false,
            (had, _) => {
                if had.is_some() {
                    self.discard(id)?;
                }
                self.make(base, id, options)?;
                true
            }
        };
        Ok(Box::new(ThinDisk {
            id: id.clone(),
            base: base.clone(),
            options: *options,
            back: self.clone(),
            fresh: AtomicBool::new(fresh),
            closed: false,
        }))
    }

    fn remove(&self, id: &DiskId) -> Result<(), Error> {
        self.discard(id)
    }

    fn disks(&self) -> Result<Vec<(DiskId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &DiskId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }

    fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        lvm::forget_bases(&self.place, gone)
    }
}

#[derive(Debug)]
struct ThinDisk {
    id: DiskId,
    base: BaseDisk,
    options: DiskOptions,
    back: LvmDisks,
    /// Just made and not attached yet: it is as its base.
    fresh: AtomicBool,
    closed: bool,
}

impl Disk for ThinDisk {
    fn id(&self) -> &DiskId {
        &self.id
    }

    fn attach(&self) -> Result<Device, Error> {
        let volatile = self.options.policy == RootPolicy::Volatile;
        if volatile && !self.fresh.swap(false, Ordering::Relaxed) {
            self.back.discard(&self.id)?;
            self.back.make(&self.base, &self.id, &self.options)?;
        }
        let volume = self.back.unused(&self.id)?;
        let size = size_of_volume(&volume)?;
        Ok(Device::new(volume.device(), DiskFormat::Raw, Bytes::new(size)))
    }

    /// What a disk takes includes here what it shares with its base.
    fn check(&self) -> Result<DiskReport, Error> {
        let volume = self.back.unused(&self.id)?;
        let size = size_of_volume(&volume)?;
        // Source: Linux `Documentation/admin-guide/device-mapper/thin-provisioning.rst`:
        // of a thin volume, first the sectors that it has.
        let says = volume.status()?.map(|status| status.says).unwrap_or_default();
        let sectors = says.split(' ').next().and_then(|word| word.parse::<u64>().ok());
        let mut report = DiskReport { size: Bytes::new(size), ..DiskReport::default() };
        match sectors {
            Some(sectors) => report.used = Bytes::new(sectors * SECTOR),
            None => {
                report.errors = 1;
                report.findings.push(format!("the device mapper says `{}` of it", says.trim()));
            }
        }
        Ok(report)
    }

    fn resize(&self, size: Bytes) -> Result<(), Error> {
        let volume = self.back.unused(&self.id)?;
        let has = size_of_volume(&volume)?;
        if size.get() < has {
            let why = "what is behind a disk's new end would be lost".to_owned();
            return Err(Error::Unsupported { op: "resize a disk", missing: Missing::Design(why) });
        }
        if size.get() == has { Ok(()) } else { volume.extend(size.get()) }
    }

    fn discard(&self, at: Bytes, length: Bytes) -> Result<(), Error> {
        let volume = self.back.unused(&self.id)?;
        files::expect_inside(&self.id, at, length, size_of_volume(&volume)?)?;
        let path = volume.device();
        discard(&path, at.get(), length.get()).map_err(Error::io("discard part of volume", &path))
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.options.policy == RootPolicy::Volatile {
            self.back.discard(&self.id)?;
        }
        self.closed = true;
        Ok(())
    }
}
