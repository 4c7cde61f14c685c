//! Roots by union file systems that are programs: slower than any other, but
//! the kernel needs to know nothing but FUSE.

mod root;
mod server;
mod start;
mod union;

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::Arc,
};

use qvd_core::{Missing, RootPolicy, Support};
use qvd_sys::mount::{self, Restrictions};
use rustix::io::Errno;

use self::{root::Served, server::Servers, union::Union};
use super::{
    BaseTree, Capabilities, Capability, Deviation, Layer, Place, Root, RootBackend, RootId, RootOptions, layer, record,
};
use crate::{Error, fsio, probe, quota};

/// Roots that a program serves over FUSE, one process for each mounted root.
///
/// The program runs as root of the range of ids that the root is shown in, with
/// the few capabilities that keeping files of others takes, without network,
/// and in a mount namespace that holds the base, the root's own layer and the
/// system's libraries: what a desktop makes it do stays there. It outlives the
/// process that started it, as desktops do, and ends with the last mount.
///
/// Its death is noticed at once and logged; [`Root::check`] names it. Whoever has
/// the root mounted gets `ENOTCONN` and never hangs.
#[derive(Debug)]
pub struct Fuse {
    place: Place,
    union: Union,
    servers: Arc<Servers>,
}

/// What the program may write, in a root's directory: records are beside it.
const FILES: &str = "files";
/// The layers in there.
const UPPER: &str = "upper";
const WORK: &str = "work";

impl Fuse {
    /// Roots in this place by `fuse-overlayfs`.
    #[must_use]
    pub fn overlay(place: Place) -> Self {
        Self { place, union: Union::Overlay, servers: Arc::default() }
    }

    /// Roots in this place by `unionfs-fuse`, which mounts by itself and
    /// therefore keeps the privilege for that. For comparison.
    #[must_use]
    pub fn unionfs(place: Place) -> Self {
        Self { place, union: Union::Unionfs, servers: Arc::default() }
    }

    fn dir(&self, id: &RootId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    fn root(&self, base: &BaseTree, id: &RootId, policy: RootPolicy) -> Served {
        Served {
            id: id.clone(),
            dir: self.dir(id),
            base: base.clone(),
            policy,
            union: self.union,
            place: self.place.clone(),
            servers: Arc::clone(&self.servers),
            closed: false,
        }
    }

    /// Serves a root that is gone afterwards, and writes a file through it.
    fn probe(&self, idmap: Option<BorrowedFd<'_>>) -> Result<Support, Error> {
        let io = |error| Error::io("probe FUSE below", self.place.dir())(error);
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(self.place.dir()).map_err(io)?;
        let lower = scratch.path().join("lower");
        std::fs::create_dir(&lower).map_err(io)?;
        let id: RootId = "0".parse().map_err(|_| io(std::io::ErrorKind::InvalidInput.into()))?;
        let servers = Arc::default();
        let base = BaseTree::layered(qvd_core::Digest::new([0; 32]), vec![Layer::Dir(lower)]);
        let mut root = Served { dir: scratch.path().join("0"), servers, ..self.root(&base, &id, RootPolicy::Volatile) };
        fsio::ensure_private_dir(&root.dir).map_err(io)?;
        let mut tried = || {
            let mount = root.mount(idmap)?;
            let owner = rustix::fs::fstat(&mount).map_err(|error| io(error.into()))?;
            let make = || rustix::fs::mkdirat(&mount, "made", rustix::fs::Mode::RWXU);
            mount::with_fs_ids(owner.st_uid, owner.st_gid, make).map_err(io)?.map_err(|error| io(error.into()))?;
            drop(mount);
            root.close()
        };
        match tried() {
            Ok(()) => Ok(Support::Yes),
            Err(Error::Unsupported { missing, .. }) => Ok(Support::No(missing)),
            Err(error @ Error::Program { .. }) => Ok(Support::No(Missing::Kernel(format!("what it needs ({error})")))),
            Err(error) => Err(error),
        }
    }
}

impl RootBackend for Fuse {
    fn name(&self) -> &'static str {
        match self.union {
            Union::Overlay => "fuse",
            Union::Unionfs => "unionfs-fuse",
        }
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let mut found = Capabilities::new();
        let works = self.probe(None)?;
        for capability in Capability::ALL {
            found.set(capability, works.clone());
        }
        if !works.is_yes() {
            return Ok(found);
        }
        let id_mapped = match probe::userns() {
            Ok(userns) => self.probe(Some(userns.as_fd()))?,
            Err(missing) => Support::No(missing),
        };
        let quota = quota::support(self.place.dir())?;
        let design = |why: &str| Support::No(Missing::Design(why.to_owned()));
        found
            .set(Capability::IdMapped, id_mapped)
            .set(Capability::Snapshots, design("what a root added has to be copied"))
            .set(Capability::QuotaBytes, quota.clone())
            .set(Capability::QuotaInodes, quota)
            .set(Capability::SharedCache, design("each root caches what its program reads once more"))
            .set(Capability::SharedMmaps, design("each root caches what its program reads once more"))
            .set(
                Capability::Unprivileged,
                Support::No(Missing::Privilege("mount, and start a program in namespaces of its own".to_owned())),
            );
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        self.union.deviations()
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        self.union.find()?;
        let dir = record::claim(&self.place, base, id, options, |dir| self.servers.expect_unused(id, dir))?;
        // One that a killed process left running is watched from here on.
        self.servers.find(id, &dir)?;
        Ok(Box::new(self.root(base, id, options.policy)))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.dir(id);
        self.servers.expect_unused(id, &dir)?;
        self.place.discard(&dir)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }
}

/// The layers of one root, as detached mounts in which owners show as inside.
#[derive(Debug)]
struct Layers {
    base: std::os::fd::OwnedFd,
    /// Holds the layer that is written to, and what belongs to it.
    files: std::os::fd::OwnedFd,
    /// Who root inside is.
    owner: (u32, u32),
}

impl Layers {
    fn open(base: &BaseTree, dir: &std::path::Path, idmap: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        let unmountable = |error: std::io::Error| match Errno::from_io_error(&error) {
            Some(Errno::PERM) => lacks(Missing::Privilege("mount file systems".to_owned())),
            Some(Errno::NOSYS) => lacks(Missing::Kernel("the mount API of Linux 5.12".to_owned())),
            Some(Errno::INVAL) if idmap.is_some() => lacks(Missing::Filesystem("id-mapped mounts".to_owned())),
            _ => Error::io("mount root", dir)(error),
        };
        let open = || {
            let files = mount::clone_dir(mount::open_dir_path(&dir.join(FILES))?.as_fd())?;
            mount::restrict(files.as_fd(), Restrictions { nodev: true, ..Restrictions::default() }, idmap)?;
            let root = rustix::fs::statat(&files, UPPER, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
            Ok((files, (root.st_uid, root.st_gid)))
        };
        let (files, owner) = open().map_err(unmountable)?;
        let base = layer::stack(base.layers(), idmap).map_err(|source| match Errno::from_io_error(source.io()) {
            Some(Errno::INVAL) if idmap.is_some() => lacks(Missing::Filesystem("id-mapped mounts".to_owned())),
            _ => Error::Mount { what: format!("base `{}`", base.path().display()), source },
        })?;
        Ok(Self { base, files, owner })
    }
}

const fn lacks(missing: Missing) -> Error {
    Error::Unsupported { op: "mount roots", missing }
}
