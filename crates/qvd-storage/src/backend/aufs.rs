//! Roots by aufs, on kernels that some distribution has patched it into.

mod options;

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use qvd_core::{Missing, RootPolicy, Support};
use qvd_sys::mount::{FsContext, MountError, Restrictions};
use rustix::{
    fs::{Mode, chmod},
    io::Errno,
};

pub use self::options::{AufsBranch, AufsOptions, AufsPermission};
use super::{
    BaseTree, Capabilities, Capability, Deviation, Layer, Place, Root, RootBackend, RootId, RootOptions, record,
};
use crate::Error;

/// Roots whose writable branch is a directory, on the directories of a base.
///
/// Aufs was never part of Linux. It stacks directories, not image files, knows no
/// id-mapped mounts, and does not say whether a root is mounted.
#[derive(Debug, Clone)]
pub struct Aufs {
    place: Place,
    /// What trying it said.
    works: Arc<OnceLock<Support>>,
}

/// The branch that is written to, in a root's directory.
const UPPER: &str = "upper";
/// Where aufs notes which number a file had: beside the branches.
const NUMBERS: &str = "xino";

impl Aufs {
    /// Roots in this place.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, works: Arc::default() }
    }

    /// Whether it works in this place, tried once.
    fn works(&self) -> Result<Support, Error> {
        if let Some(known) = self.works.get() {
            return Ok(known.clone());
        }
        let found = self.probe()?;
        Ok(self.works.get_or_init(|| found).clone())
    }

    fn dir(&self, id: &RootId) -> PathBuf {
        self.place.dir().join(id.as_str())
    }

    /// Mounts two empty directories, for a trial.
    fn probe(&self) -> Result<Support, Error> {
        let io = |error| Error::io("probe aufs below", self.place.dir())(error);
        let scratch = tempfile::Builder::new().prefix(".probe-").tempdir_in(self.place.dir()).map_err(io)?;
        for name in ["lower", UPPER] {
            std::fs::create_dir(scratch.path().join(name)).map_err(io)?;
        }
        match mount(&[Layer::Dir(scratch.path().join("lower"))], scratch.path()) {
            Ok(_mount) => Ok(Support::Yes),
            Err(Error::Unsupported { missing, .. }) => Ok(Support::No(missing)),
            Err(error) => Err(error),
        }
    }
}

/// Stacks `own/upper` on the layers of a base.
fn mount(layers: &[Layer], own: &Path) -> Result<OwnedFd, Error> {
    let lower = layers.iter().map(|layer| match layer {
        Layer::Dir(path) => Ok(path.clone()),
        Layer::Erofs(_) | Layer::Data(_) => Err(lacks(Missing::Design("aufs stacks directories and no images".into()))),
    });
    let options = AufsOptions::new(own.join(UPPER), lower.collect::<Result<Vec<_>, _>>()?, own.join(NUMBERS))?;
    let mounted = || {
        let context = FsContext::open("aufs")?;
        options.each(|key, value| match value {
            Some(value) => context.set(key, value),
            None => context.set_flag(key),
        })?;
        context.mount(Restrictions { nodev: true, ..Restrictions::default() })
    };
    mounted().map_err(|source: MountError| match Errno::from_io_error(source.io()) {
        Some(Errno::NODEV) => lacks(Missing::Kernel(
            "aufs, which is not part of Linux: a distribution has to have patched it in (`modprobe aufs` where it is a module)"
                .into(),
        )),
        Some(Errno::NOSYS) => lacks(Missing::Kernel("the mount API of Linux 5.12".into())),
        Some(Errno::PERM) => lacks(Missing::Privilege("mount file systems".into())),
        _ => Error::Mount { what: format!("root `{}`", own.display()), source },
    })
}

const fn lacks(missing: Missing) -> Error {
    Error::Unsupported { op: "mount roots", missing }
}

impl RootBackend for Aufs {
    fn name(&self) -> &'static str {
        "aufs"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let works = self.works()?;
        let design = |why: &str| match &works {
            Support::Yes => Support::No(Missing::Design(why.to_owned())),
            no => no.clone(),
        };
        let quota = design("limits are not set for its branches; use `overlayfs` or `loop`");
        let mut found = Capabilities::new();
        for capability in Capability::ALL {
            found.set(capability, works.clone());
        }
        found
            .set(Capability::IdMapped, design("aufs knows no id-mapped mounts"))
            .set(Capability::Snapshots, design("what a root added has to be copied"))
            .set(Capability::QuotaBytes, quota.clone())
            .set(Capability::QuotaInodes, quota)
            .set(Capability::Unprivileged, design("aufs is mounted by root alone"));
        Ok(found)
    }

    fn deviations(&self) -> &'static [Deviation] {
        // Source: aufs(5), sections "Incompatible with an Ordinary Filesystem".
        use Deviation as D;
        &[D::StaleMaps, D::FrozenAccessTimes, D::NoDirectoryRename, D::UnnoticedUse]
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        if !options.quota.is_unlimited() {
            let missing = Missing::Design("limits are not set for branches of aufs; use `overlayfs` or `loop`".into());
            return Err(Error::Unsupported { op: "limit roots", missing });
        }
        // Here rather than at the mount: a root that can never be used is not made.
        if let Support::No(missing) = self.works()? {
            return Err(lacks(missing));
        }
        // Aufs does not say who uses it.
        let dir = record::claim(&self.place, base, id, options, |_| Ok(()))?;
        let (id, base, place) = (id.clone(), base.clone(), self.place.clone());
        Ok(Box::new(Stacked { id, dir, base, policy: options.policy, place, closed: false }))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        self.place.discard(&self.dir(id))
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }
}

#[derive(Debug)]
struct Stacked {
    id: RootId,
    dir: PathBuf,
    base: BaseTree,
    policy: RootPolicy,
    place: Place,
    closed: bool,
}

impl Root for Stacked {
    fn id(&self) -> &RootId {
        &self.id
    }

    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        if idmap.is_some() {
            return Err(lacks(Missing::Design("aufs knows no id-mapped mounts".to_owned())));
        }
        let upper = self.dir.join(UPPER);
        if self.policy == RootPolicy::Volatile {
            self.place.discard(&upper)?;
            self.place.discard(&self.dir.join(NUMBERS))?;
        }
        let io = |error| Error::io("make root", &upper)(error);
        match std::fs::create_dir(&upper) {
            // The branch's mode is that of `/` inside; the umask must not show there.
            Ok(()) => chmod(&upper, Mode::from_raw_mode(0o755)).map_err(|error| io(error.into()))?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io(error)),
        }
        mount(self.base.layers(), &self.dir)
    }

    fn close(&mut self) -> Result<(), Error> {
        if !self.closed && self.policy == RootPolicy::Volatile {
            self.place.discard(&self.dir)?;
        }
        self.closed = true;
        Ok(())
    }
}
