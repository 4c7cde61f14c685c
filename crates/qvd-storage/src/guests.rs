//! What virtual machines are given of a store: a file with the files of an
//! image, and disks for what a machine writes and for homes.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use qvd_core::{Bytes, DesktopId, Digest, RootPolicy};

use crate::{
    BaseDisk, Disk, DiskBackend as _, DiskFormat, DiskId, DiskOptions, Error, Image, Place, Qcow2, RootId, Store, fsio,
    make_guest_base, pin,
    program::Program,
    qcow2,
    repository::{CommitId, Repository},
    trash::Trash,
};

const MKFS: Program = Program { name: "mkfs.ext4", package: "e2fsprogs" };

/// It writes a few megabytes; a disk that is very busy needs longer for that.
const MADE_WITHIN: Duration = Duration::from_secs(120);

/// What the names of empty file systems begin with; their size in bytes follows.
const BLANK: &str = "blank-";

/// The least that an empty file system and what a desktop writes fit in.
const LEAST_DISK: Bytes = Bytes::mib(64);

/// A file that all machines of an image read their system from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestBase {
    /// An EROFS as [`make_guest_base`] makes it.
    pub path: PathBuf,
    /// Its length, a multiple of 2 MiB.
    pub size: Bytes,
}

/// The part of a store that machines use.
#[derive(Debug)]
pub(crate) struct Guests {
    /// Bases by the digest of their image, and empty file systems by size.
    dir: PathBuf,
    roots: Qcow2,
    homes: Qcow2,
    /// One base is made at a time: each is a whole image.
    making: Mutex<()>,
}

impl Guests {
    /// Opens it, and removes what a killed process left half done and bases of
    /// images that are not there any more.
    pub(crate) fn open(store: &Path, repository: &Repository, trash: &Arc<Trash>) -> Result<Self, Error> {
        let dir = store.join("guests");
        let disks = store.join("disks");
        for private in [&dir, &disks] {
            fsio::ensure_private_dir(private).map_err(Error::io("use", private))?;
        }
        let place = |dir: &Path| {
            trash.take_temporary(dir)?;
            Place::below(dir, Arc::clone(trash))
        };
        let (roots, homes) = (place(&disks.join("qcow2"))?, place(&store.join("home-disks"))?);
        trash.take_temporary(&dir)?;
        for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let entry = entry.map_err(Error::io("read", &dir))?;
            let name = entry.file_name();
            let image = name.to_str().map(|name| name.strip_suffix(pin::KNOWN_BY).unwrap_or(name));
            if image.and_then(CommitId::from_hex).is_some_and(|id| !repository.has_commit(id)) {
                trash.discard(&entry.path())?;
            }
        }
        Ok(Self { dir, roots: Qcow2::new(roots), homes: Qcow2::new(homes), making: Mutex::default() })
    }

    fn base(&self, image: &Image) -> Result<GuestBase, Error> {
        let path = self.dir.join(image.digest().hex());
        let found = || match fs::metadata(&path) {
            Ok(about) => {
                pin::verify(&path)?;
                Ok(Some(GuestBase { path: path.clone(), size: Bytes::new(about.len()) }))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("look at", &path)(error)),
        };
        if let Some(base) = found()? {
            return Ok(base);
        }
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(base) = found()? {
            return Ok(base);
        }
        let tree = image.base().open()?;
        // The program goes by paths, so the tree gets one, which nobody else sees.
        let at = tempfile::Builder::new().prefix(".at-").tempdir_in(&self.dir);
        let at = at.map_err(Error::io("make a directory in", &self.dir))?;
        let made = qvd_sys::mount::in_private_namespace(|| {
            let there = fsio::open_dir(at.path()).map_err(Error::io("open", at.path()))?;
            qvd_sys::mount::attach(tree.as_fd(), there.as_fd()).map_err(Error::io("show an image at", at.path()))?;
            make_guest_base(at.path(), &path)
        });
        let size = made.map_err(Error::io("show an image at", at.path()))??;
        pin::pin(&path)?;
        Ok(GuestBase { path, size })
    }

    fn blank_path(&self, size: u64) -> PathBuf {
        self.dir.join(format!("{BLANK}{size}"))
    }

    /// An empty file system of this size, made once.
    fn blank(&self, size: Bytes, known_by: Digest) -> Result<BaseDisk, Error> {
        let path = self.blank_path(size.get());
        let io = |op| Error::io(op, &path);
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if !path.try_exists().map_err(io("look at"))? {
            let file = tempfile::Builder::new().prefix(".new-").tempfile_in(&self.dir);
            let file = file.map_err(Error::io("make a file in", &self.dir))?;
            file.as_file().set_len(size.get()).map_err(io("make"))?;
            // The host's file reads as zeros: nothing of it has to be written to be empty.
            let options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0";
            let arguments = ["-q", "-F", "-m", "0", "-E", options].map(std::ffi::OsStr::new);
            let arguments = arguments.into_iter().chain([file.path().as_os_str()]);
            MKFS.run("make a disk for machines", arguments, Stdio::null(), MADE_WITHIN)?;
            file.as_file().sync_all().map_err(io("sync"))?;
            file.persist(&path).map_err(|error| io("name")(error.error))?;
            fsio::sync_dir(&self.dir).map_err(Error::io("sync", &self.dir))?;
            pin::pin(&path)?;
        }
        pin::verify(&path)?;
        Ok(BaseDisk::new(known_by, path, DiskFormat::Raw))
    }

    /// A disk that begins as an empty file system. One that is kept has the
    /// size that it was made with, whatever is asked for now.
    fn disk(
        &self,
        disks: &Qcow2,
        id: &DiskId,
        known_by: Digest,
        policy: RootPolicy,
        size: Bytes,
    ) -> Result<Box<dyn Disk>, Error> {
        let size = match (policy, disks.find(id)?) {
            (RootPolicy::Persistent, Some(RootPolicy::Persistent)) => self.kept_size(disks, id)?,
            _ => Bytes::new(size.get().max(LEAST_DISK.get()).next_multiple_of(1 << 20)),
        };
        disks.create(&self.blank(size, known_by)?, id, &DiskOptions::from(policy))
    }

    /// How large a kept disk is. Its header may have been written by whoever got
    /// out of a machine: a size that no file system here was ever made with is a lie.
    fn kept_size(&self, disks: &Qcow2, id: &DiskId) -> Result<Bytes, Error> {
        let path = disks.file(id);
        let file = File::open(&path).map_err(Error::io("open disk", &path))?;
        let size = qcow2::Image::open(file, &path)?.header().size;
        if self.blank_path(size).is_file() {
            return Ok(Bytes::new(size));
        }
        let io = Error::io("open what is behind disk", &path);
        Err(io(io::Error::new(io::ErrorKind::NotFound, format!("no disk of {size} bytes was made here"))))
    }
}

impl Store {
    /// The file that machines of an image read their system from, made at the
    /// first call: that takes as long as reading the whole image.
    ///
    /// # Errors
    /// As [`make_guest_base`], or the image cannot be mounted; [`Error::DamagedPart`] when
    /// the file is not as it was made.
    pub fn guest_base(&self, image: &Image) -> Result<GuestBase, Error> {
        self.guests().base(image)
    }

    /// The disk for what a desktop writes to its system when it is a machine: an
    /// empty `ext4` of `size` that begins to differ. It keeps its image from
    /// being collected.
    ///
    /// # Errors
    /// As [`DiskBackend::create`](crate::DiskBackend::create); [`Error::Unsupported`]
    /// without `mkfs.ext4`; [`Error::DamagedPart`] when what is behind it was changed.
    pub fn guest_root(
        &self,
        image: &Image,
        id: DesktopId,
        policy: RootPolicy,
        size: Bytes,
    ) -> Result<Box<dyn Disk>, Error> {
        let kept = policy == RootPolicy::Persistent;
        self.repository().lease(&RootId::from(id), CommitId::new(image.digest()), kept)?;
        let guests = self.guests();
        guests.disk(&guests.roots, &id.into(), image.digest(), policy, size)
    }

    /// The disk of a desktop's home, always kept; empty when it is new.
    ///
    /// # Errors
    /// As [`Store::guest_root`].
    pub fn guest_home(&self, id: DesktopId, size: Bytes) -> Result<Box<dyn Disk>, Error> {
        let guests = self.guests();
        // An empty file system is the same, whatever image the home is used with.
        guests.disk(&guests.homes, &id.into(), Digest::new([0; 32]), RootPolicy::Persistent, size)
    }

    /// Removes what a desktop wrote as a machine. Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// As [`DiskBackend::remove`](crate::DiskBackend::remove).
    pub fn remove_guest_root(&self, id: DesktopId) -> Result<(), Error> {
        self.guests().roots.remove(&id.into())?;
        self.repository().release(&RootId::from(id))
    }

    /// Removes the disk of a desktop's home and everything on it. Removing what is not
    /// there is `Ok`.
    ///
    /// # Errors
    /// As [`DiskBackend::remove`](crate::DiskBackend::remove).
    pub fn remove_guest_home(&self, id: DesktopId) -> Result<(), Error> {
        self.guests().homes.remove(&id.into())
    }

    /// Removes every volatile root, of containers and of machines, but those of
    /// the desktops in `keep`. A root that is still in use stays; the others go
    /// all the same.
    ///
    /// # Errors
    /// The last failure, after everything was tried.
    pub fn sweep_volatile(&self, keep: &[DesktopId]) -> Result<(), Error> {
        let keep: Vec<RootId> = keep.iter().copied().map(RootId::from).collect();
        let mut failure = None;
        let mut sweep = |id: &str, removed: Result<(), Error>| {
            if let Err(error) = removed {
                tracing::warn!(root = id, %error, "root left behind");
                failure = Some(error);
            }
        };
        for (id, policy) in self.roots()? {
            if policy == RootPolicy::Volatile && !keep.contains(&id) {
                sweep(id.as_str(), self.remove_root(&id));
            }
        }
        for (disk, policy) in self.guests().roots.disks()? {
            let Ok(id) = disk.as_str().parse::<RootId>() else { continue };
            if policy == RootPolicy::Volatile && !keep.contains(&id) {
                let removed = self.guests().roots.remove(&disk).and_then(|()| self.repository().release(&id));
                sweep(id.as_str(), removed);
            }
        }
        failure.map_or(Ok(()), Err)
    }
}
