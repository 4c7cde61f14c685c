//! Disks that are files, each in a directory of its own: what all ways to make
//! such files have in common.

mod on_base;

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use qvd_core::{Bytes, Missing, RootPolicy, Support};
use rustix::{fs::FallocateFlags, io::Errno};

use super::{
    BaseDisk, Device, Disk, DiskCapabilities, DiskCapability, DiskFormat, DiskId, DiskOptions, DiskReport, OnBase,
    lock,
    qcow2::BackingPolicy,
    record::{self, Record},
};
use crate::{Error, Place, fsio};

/// One way to make the file of a disk.
pub(super) trait Make: fmt::Debug + Clone + Send + Sync + 'static {
    /// Name of the file, in the disk's directory.
    const FILE: &'static str;
    /// Its format.
    const FORMAT: DiskFormat;

    /// Fills the empty file `to` with a disk on `base`. Nothing is synced.
    fn make(&self, base: &BaseDisk, size: Option<Bytes>, to: &File, path: &Path) -> Result<(), Error>;

    /// Opens what is needed to use the disk, and says how large it is in bytes.
    fn size(&self, base: &BaseDisk, path: &Path) -> Result<u64, Error>;

    /// Looks at what is inside; the space it takes is known already.
    fn check(&self, base: &BaseDisk, path: &Path, report: &mut DiskReport) -> Result<(), Error>;

    /// Makes it larger; it is not in use.
    fn grow(&self, base: &BaseDisk, path: &Path, size: u64) -> Result<(), Error>;

    /// Makes bytes zero that are inside of it; it is not in use.
    fn discard(&self, base: &BaseDisk, path: &Path, at: u64, length: u64) -> Result<(), Error>;

    /// What may be behind its base, if that stays behind it.
    fn behind(&self) -> Option<&BackingPolicy> {
        None
    }
}

/// The disks of one way, in a place.
#[derive(Debug, Clone)]
pub(super) struct Files<M> {
    place: Place,
    making: M,
}

/// One of them.
#[derive(Debug)]
struct FileDisk<M> {
    id: DiskId,
    base: Mutex<BaseDisk>,
    options: DiskOptions,
    files: Files<M>,
    /// Just made and not attached yet: it is as its base.
    fresh: AtomicBool,
    closed: bool,
}

impl<M: Make> Files<M> {
    pub(super) const fn new(place: Place, making: M) -> Self {
        Self { place, making }
    }

    pub(super) const fn place(&self) -> &Place {
        &self.place
    }

    fn dir(&self, id: &DiskId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    /// The file of a disk.
    pub(super) fn file(&self, id: &DiskId) -> PathBuf {
        self.dir(id).join(M::FILE)
    }

    pub(super) fn create(&self, base: &BaseDisk, id: &DiskId, options: &DiskOptions) -> Result<Box<dyn Disk>, Error> {
        let dir = self.dir(id);
        let fresh = match (record::find(&self.place, id)?, options.policy) {
            (Some(RootPolicy::Persistent), RootPolicy::Persistent) => {
                self.expect_base(id, base)?;
                self.expect_size(base, id, options)?;
                false
            }
            // What runs keeps its disk; the next attachment takes the new size.
            (Some(RootPolicy::Volatile), RootPolicy::Volatile) => false,
            (had, policy) => {
                if had.is_some() {
                    self.remove(id)?;
                }
                self.make(base, &dir, options.size, policy)?;
                true
            }
        };
        Ok(Box::new(FileDisk {
            id: id.clone(),
            base: Mutex::new(base.clone()),
            options: *options,
            files: self.clone(),
            fresh: AtomicBool::new(fresh),
            closed: false,
        }))
    }

    pub(super) fn remove(&self, id: &DiskId) -> Result<(), Error> {
        self.expect_unused(id)?;
        self.place.discard(&self.dir(id))
    }

    pub(super) fn disks(&self) -> Result<Vec<(DiskId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    pub(super) fn find(&self, id: &DiskId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }

    /// Makes a disk beside its place and renames it there: it is whole or absent.
    fn make(&self, base: &BaseDisk, dir: &Path, size: Option<Bytes>, policy: RootPolicy) -> Result<(), Error> {
        let io = |op| Error::io(op, dir);
        let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(self.place.dir()).map_err(io("make disk"))?;
        // Its own cleaning up would keep the caller waiting.
        let scratch = scratch.keep();
        let fill = || {
            let path = scratch.join(M::FILE);
            let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
            let file = file.map_err(io("make disk"))?;
            self.making.make(base, size, &file, &path)?;
            if policy == RootPolicy::Persistent {
                file.sync_all().map_err(io("make disk"))?;
                Record::new(base).write(&scratch)?;
            }
            fs::rename(&scratch, dir).map_err(io("make disk"))?;
            if policy == RootPolicy::Persistent {
                fsio::sync_dir(self.place.dir()).map_err(io("make disk"))?;
            }
            Ok(())
        };
        fill().inspect_err(|_| {
            if let Err(error) = self.place.discard(&scratch) {
                tracing::warn!(path = %scratch.display(), %error, "disk left behind until the next start");
            }
        })
    }

    pub(super) fn expect_unused(&self, id: &DiskId) -> Result<(), Error> {
        let file = self.file(id);
        let used = lock::path_in_use(&file).map_err(Error::io("look who uses", &file))?;
        if used { Err(Error::DiskBusy(id.clone())) } else { Ok(()) }
    }

    /// Refuses another size than a kept disk has.
    fn expect_size(&self, base: &BaseDisk, id: &DiskId, options: &DiskOptions) -> Result<(), Error> {
        let Some(wanted) = options.size else { return Ok(()) };
        if wanted.get() == self.making.size(base, &self.file(id))? {
            return Ok(());
        }
        let missing =
            Missing::Design("a kept disk keeps its size until it is made larger by a call for that".to_owned());
        Err(Error::Unsupported { op: "change the size of a disk", missing })
    }
}

impl<M: Make> Disk for FileDisk<M> {
    fn id(&self) -> &DiskId {
        &self.id
    }

    fn attach(&self) -> Result<Device, Error> {
        self.files.expect_unused(&self.id)?;
        let (base, volatile) = (self.base(), self.options.policy == RootPolicy::Volatile);
        if volatile && !self.fresh.swap(false, Ordering::Relaxed) {
            let dir = self.files.dir(&self.id);
            self.files.place.discard(&dir)?;
            self.files.make(&base, &dir, self.options.size, RootPolicy::Volatile)?;
        }
        let path = self.files.file(&self.id);
        let size = self.files.making.size(&base, &path)?;
        let device = Device::new(path, M::FORMAT, Bytes::new(size));
        Ok(if self.files.making.behind().is_some() { device.on(base) } else { device })
    }

    fn check(&self) -> Result<DiskReport, Error> {
        self.files.expect_unused(&self.id)?;
        let path = self.files.file(&self.id);
        let about = fs::metadata(&path).map_err(Error::io("check disk", &path))?;
        // In units of 512 bytes, whatever the file system's blocks are.
        let mut report = DiskReport { used: Bytes::new(about.blocks() * 512), ..DiskReport::default() };
        self.files.making.check(&self.base(), &path, &mut report)?;
        Ok(report)
    }

    fn resize(&self, size: Bytes) -> Result<(), Error> {
        self.files.expect_unused(&self.id)?;
        let path = self.files.file(&self.id);
        let base = self.base();
        let has = self.files.making.size(&base, &path)?;
        let refuse =
            |why: &str| Err(Error::Unsupported { op: "resize a disk", missing: Missing::Design(why.to_owned()) });
        match size.get() {
            size if size < has => refuse("what is behind a disk's new end would be lost"),
            size if !size.is_multiple_of(SECTOR) => refuse("a disk has a whole number of sectors of 512 bytes"),
            size if size == has => Ok(()),
            size => self.files.making.grow(&base, &path, size),
        }
    }

    fn discard(&self, at: Bytes, length: Bytes) -> Result<(), Error> {
        self.files.expect_unused(&self.id)?;
        let (base, path) = (self.base(), self.files.file(&self.id));
        let has = self.files.making.size(&base, &path)?;
        expect_inside(&self.id, at, length, has)?;
        self.files.making.discard(&base, &path, at.get(), length.get())
    }

    fn on_base(&self) -> Option<&dyn OnBase> {
        self.files.making.behind().map(|_| self as &dyn OnBase)
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.options.policy == RootPolicy::Volatile {
            self.files.remove(&self.id)?;
        }
        self.closed = true;
        Ok(())
    }
}

impl<M> FileDisk<M> {
    fn base(&self) -> BaseDisk {
        self.base.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Refuses bytes that a disk of that size does not have.
pub(super) fn expect_inside(id: &DiskId, at: Bytes, length: Bytes, size: u64) -> Result<(), Error> {
    match at.get().checked_add(length.get()) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::Refused(format!(
            "disk {id} has {size} bytes: no {} of them begin at byte {}",
            length.get(),
            at.get()
        ))),
    }
}

/// A disk's size is a multiple of this, in bytes.
const SECTOR: u64 = 512;

/// How large a disk on a base is to be in bytes, given what was asked for.
pub(super) fn size_on(base: u64, wanted: Option<Bytes>) -> Result<u64, Error> {
    let base = base.next_multiple_of(SECTOR);
    let size = wanted.map_or(base, Bytes::get);
    let refuse = |why: String| Err(Error::Unsupported { op: "make a disk", missing: Missing::Design(why) });
    if size < base {
        return refuse(format!("a disk is at least as large as its base, {}", Bytes::new(base)));
    }
    if !size.is_multiple_of(SECTOR) {
        return refuse(format!("a disk has a whole number of sectors of {SECTOR} bytes"));
    }
    Ok(size)
}

/// What disks that are files can do in a directory, apart from how they are made.
pub(super) fn capabilities(place: &Place, works: &Support) -> Result<DiskCapabilities, Error> {
    let mut found = DiskCapabilities::all(works);
    if !works.is_yes() {
        return Ok(found);
    }
    let dir = place.dir();
    let io = |error: io::Error| Error::io("try disks below", dir)(error);
    let file = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    let other = File::open(file.path()).map_err(io)?;
    let noticed = match lock::claim(&other).and_then(|_| lock::in_use(file.as_file())) {
        Ok(true) => Support::Yes,
        Ok(false) => Support::No(Missing::Filesystem("locks that other processes see".to_owned())),
        Err(_) => Support::No(Missing::Filesystem("locks of open files".to_owned())),
    };
    found.set(DiskCapability::NoticedUse, noticed);
    if fsio::in_memory(dir).map_err(io)? {
        found.set(DiskCapability::Durable, Support::No(Missing::Filesystem("storage: it is in memory".to_owned())));
    }
    Ok(found)
}

/// Makes bytes of a file zero: as a hole where it can have one.
pub(super) fn zero(file: &File, at: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => write_zeros(file, at, length),
        done => Ok(done?),
    }
}

/// As [`zero`], with zeros that are written.
pub(super) fn write_zeros(file: &File, at: u64, length: u64) -> io::Result<()> {
    const AT_ONCE: u64 = 1 << 20;
    let zeros = vec![0; usize::try_from(AT_ONCE.min(length)).unwrap_or(0)];
    let mut done = 0;
    while done < length {
        let piece = usize::try_from((length - done).min(AT_ONCE)).unwrap_or(0);
        file.write_all_at(zeros.get(..piece).unwrap_or_default(), at + done)?;
        done += piece as u64;
    }
    Ok(())
}

/// Whether files in `dir` can be given holes, found by making one.
pub(super) fn holes(dir: &Path) -> Result<Support, Error> {
    let tried = || -> io::Result<Support> {
        let file = tempfile::tempfile_in(dir)?;
        file.write_all_at(&[1; 8192], 0)?;
        match rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096) {
            Ok(()) => Ok(Support::Yes),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Support::No(Missing::Filesystem("holes in files".to_owned()))),
            Err(error) => Err(error.into()),
        }
    };
    tried().map_err(Error::io("probe holes below", dir))
}

/// Passes the calls of [`DiskBackend`](super::DiskBackend) to the [`Files`] in a type.
macro_rules! delegate {
    ($type:ident, $name:literal, $deviations:expr) => {
        impl super::DiskBackend for $type {
            fn name(&self) -> &'static str {
                $name
            }
            fn capabilities(&self) -> Result<super::DiskCapabilities, crate::Error> {
                self.probe()
            }
            fn deviations(&self) -> &'static [super::DiskDeviation] {
                $deviations
            }
            fn create(
                &self,
                base: &super::BaseDisk,
                id: &super::DiskId,
                options: &super::DiskOptions,
            ) -> Result<Box<dyn super::Disk>, crate::Error> {
                self.0.create(base, id, options)
            }
            fn remove(&self, id: &super::DiskId) -> Result<(), crate::Error> {
                self.0.remove(id)
            }
            fn disks(&self) -> Result<Vec<(super::DiskId, qvd_core::RootPolicy)>, crate::Error> {
                self.0.disks()
            }
            fn find(&self, id: &super::DiskId) -> Result<Option<qvd_core::RootPolicy>, crate::Error> {
                self.0.find(id)
            }
        }
    };
}
pub(super) use delegate;
