//! The subvolumes of a place, and what is done with them.

use std::{
    ffi::{CStr, CString, OsStr},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{Digest, Missing};
use qvd_sys::btrfs;
use rustix::io::Errno;

use crate::{
    Error,
    backend::{
        BaseTree, Place, Quota, RootId, exclusive,
        overlayfs::{self, UPPER},
        record::Record,
    },
    copytree::{Content, copy_tree},
    fsio,
};

/// Where bases are, in the place; no root has a name in capital letters.
const BASES: &str = "BASES";

#[derive(Debug, Clone)]
pub(super) struct Volumes {
    pub(super) place: Place,
    importing: Arc<Mutex<()>>,
}

impl Volumes {
    pub(super) fn new(place: Place) -> Self {
        Self { place, importing: Arc::default() }
    }

    pub(super) fn open_place(&self) -> Result<OwnedFd, Error> {
        fsio::open_dir(self.place.dir()).map_err(Error::io("open", self.place.dir()))
    }

    pub(super) fn dir(&self, id: &RootId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    /// What a failure of one of the file system's own calls says.
    pub(super) fn explain(&self, op: &'static str, error: io::Error) -> Error {
        let missing = match Errno::from_io_error(&error) {
            Some(Errno::NOTTY | Errno::OPNOTSUPP) => not_btrfs(),
            Some(Errno::NOTCONN) => no_quota(),
            Some(Errno::PERM | Errno::ACCESS) => Missing::Privilege("manage subvolumes of btrfs".to_owned()),
            Some(Errno::INVAL) if op == "switch quotas on" => Missing::Kernel("simple quotas of btrfs".to_owned()),
            _ => return Error::io(op, self.place.dir())(error),
        };
        Error::Unsupported { op, missing }
    }

    /// The subvolume of a base, copied there when it is not yet.
    pub(super) fn base(&self, base: &BaseTree) -> Result<OwnedFd, Error> {
        let _one_at_a_time = self.importing.lock().unwrap_or_else(PoisonError::into_inner);
        let bases = self.place.dir().join(BASES);
        fsio::ensure_private_dir(&bases).map_err(Error::io("use", &bases))?;
        let name = base.digest().hex();
        let dir = bases.join(&name);
        match fsio::open_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other.map_err(Error::io("open base", &dir)),
        }
        let scratch = bases.join(format!("new-{name}"));
        let copied = || {
            // What a killed process left of it.
            self.delete(&scratch)?;
            self.subvolume(&scratch)?;
            let own = fsio::open_dir(&scratch).map_err(Error::io("make base", &scratch))?;
            exclusive::prepare(&own, &scratch)?;
            let target = fsio::open_dir_below(&own, UPPER).map_err(Error::io("make base", &scratch))?;
            copy_tree(base.path(), base.open()?.as_fd(), target.as_fd(), Content::Cheapest)?;
            rustix::fs::syncfs(&own).map_err(Error::io("write base", &scratch))?;
            btrfs::set_read_only(own.as_fd(), true).map_err(|error| self.explain("make bases", error))?;
            std::fs::rename(&scratch, &dir).map_err(Error::io("make base", &dir))?;
            fsio::sync_dir(&bases).map_err(Error::io("make base", &dir))?;
            Ok(own)
        };
        copied().inspect_err(|_| {
            if let Err(error) = self.delete(&scratch) {
                tracing::warn!(path = %scratch.display(), %error, "part of a base left behind");
            }
        })
    }

    /// Takes bases out of the way that `gone` names. Snapshots of them stay as they are.
    pub(super) fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        let _one_at_a_time = self.importing.lock().unwrap_or_else(PoisonError::into_inner);
        let bases = self.place.dir().join(BASES);
        let entries = match std::fs::read_dir(&bases) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(Error::io("read", &bases))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &bases))?;
            let digest = entry.file_name().to_str().and_then(|name| format!("sha256:{name}").parse().ok());
            if digest.is_some_and(gone) {
                self.delete(&entry.path())?;
            }
        }
        Ok(())
    }

    pub(super) fn subvolume(&self, path: &Path) -> Result<(), Error> {
        let (parent, name) = place_of(path)?;
        btrfs::create_subvolume(parent.as_fd(), &name).map_err(|error| self.explain("make subvolumes", error))
    }

    /// Makes a snapshot at `path`.
    pub(super) fn copy(&self, of: BorrowedFd<'_>, path: &Path, read_only: bool) -> Result<(), Error> {
        let (parent, name) = place_of(path)?;
        btrfs::snapshot(of, parent.as_fd(), &name, read_only).map_err(|error| self.explain("make snapshots", error))
    }

    /// Takes a subvolume out of the way, `Ok` when there is none. What the kernel
    /// does at a deletion takes longer the more of it is cached, so that happens
    /// in the background.
    pub(super) fn delete(&self, path: &Path) -> Result<(), Error> {
        let (parent, name) = place_of(path)?;
        let removed = match self.place.trash().discard_at(&parent, name.as_c_str()) {
            // The trash is on another subvolume, or this one is read-only.
            Err(error) if matches!(error.kind(), io::ErrorKind::CrossesDevices | io::ErrorKind::ReadOnlyFilesystem) => {
                delete_at(parent.as_fd(), &name)
            }
            done => done,
        };
        removed.map_err(|error| self.explain("remove subvolumes", error))
    }

    /// Makes a root beside its place and renames it there: it is whole or absent.
    pub(super) fn make(&self, of: BorrowedFd<'_>, id: &RootId, record: Option<&Record>) -> Result<(), Error> {
        let (dir, scratch) = (self.dir(id), self.place.dir().join(format!(".new-{id}")));
        let made = || {
            self.delete(&scratch)?;
            self.copy(of, &scratch, false)?;
            exclusive::forget_origin(&scratch)?;
            overlayfs::note_base(&scratch, &dir.join(exclusive::LOWER)).map_err(Error::io("make root", &dir))?;
            if let Some(record) = record {
                record.write(&scratch)?;
            }
            std::fs::rename(&scratch, &dir).map_err(Error::io("make root", &dir))?;
            if record.is_some() {
                fsio::sync_dir(self.place.dir()).map_err(Error::io("make root", &dir))?;
            }
            Ok(())
        };
        made().inspect_err(|_| {
            if let Err(error) = self.delete(&scratch) {
                tracing::warn!(path = %scratch.display(), %error, "part of a root left behind");
            }
        })
    }

    /// Makes a volatile root from its base again.
    pub(super) fn renew(&self, base: &BaseTree, id: &RootId, quota: Quota) -> Result<(), Error> {
        let dir = self.dir(id);
        exclusive::check_unused(id, &dir, self.place.trash())?;
        let base = self.base(base)?;
        self.delete(&dir)?;
        self.make(base.as_fd(), id, None)?;
        self.limit(&dir, quota)
    }

    pub(super) fn limit(&self, dir: &Path, quota: Quota) -> Result<(), Error> {
        let Some(bytes) = quota.bytes else { return Ok(()) };
        let own = fsio::open_dir(dir).map_err(Error::io("limit root", dir))?;
        let set = btrfs::subvolume_id(own.as_fd()).and_then(|id| {
            // The group of one subvolume has its number.
            btrfs::limit_qgroup(own.as_fd(), id, bytes.get())
        });
        set.map_err(|error| self.explain("limit roots", error))
    }
}

pub(super) fn not_btrfs() -> Missing {
    Missing::Filesystem("subvolumes: it is no btrfs".to_owned())
}

fn no_quota() -> Missing {
    Missing::Filesystem("quotas that are switched on (`btrfs quota enable --simple`)".to_owned())
}

pub(super) fn no_inodes() -> Missing {
    Missing::Filesystem("limits of files: btrfs has none".to_owned())
}

/// The directory that holds `path`, open, and the name in it.
fn place_of(path: &Path) -> Result<(OwnedFd, CString), Error> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let name = CString::new(path.file_name().unwrap_or(OsStr::new("")).as_bytes())
        .map_err(io::Error::from)
        .map_err(Error::io("open", path))?;
    Ok((fsio::open_dir(parent).map_err(Error::io("open", parent))?, name))
}

/// Deletes a subvolume and those in it; `Ok` when there is none.
///
/// # Errors
/// `ENOTTY` or `EINVAL` for what is no subvolume.
pub(crate) fn delete_at(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let tried = match btrfs::delete_subvolume(parent, name) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            let dir = fsio::open_dir_below(parent, name)?;
            delete_inner(dir.as_fd(), btrfs::subvolume_id(dir.as_fd())?)?;
            btrfs::delete_subvolume(parent, name)
        }
        tried => tried,
    };
    match tried {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Deletes the subvolumes in a subvolume, the innermost first. An overlay
/// lets no desktop make any; an administrator may have.
fn delete_inner(any: BorrowedFd<'_>, id: u64) -> io::Result<()> {
    for inner in btrfs::subvolumes_in(any, id)? {
        delete_inner(any, inner)?;
        match btrfs::delete_subvolume_by_id(any, inner) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
