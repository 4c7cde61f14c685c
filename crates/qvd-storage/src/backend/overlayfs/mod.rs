//! Roots by overlayfs: constant time, constant space, and one page cache for
//! all desktops of an image.

mod options;
mod root;
mod stack;

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::OnceLock,
};

use qvd_core::{Missing, RootPolicy, Support};

pub use self::options::OverlayOptions;
use self::{options::Scratch, root::Overlay};
pub(crate) use self::{
    options::support,
    root::{check_before_removal, check_unused, note_base},
    stack::{How, UPPER, WORK, mount_overlay},
};
use crate::{
    Error,
    backend::{BaseTree, Capabilities, Capability, Deviation, Place, Root, RootBackend, RootId, RootOptions, record},
    probe, quota,
};

/// Roots made of an upper directory on a base tree.
///
/// On disk nothing is shifted: base, upper and home hold the ids that exist
/// inside, and each mount shows them in its desktop's range. Without
/// privileges, inside a user namespace, it works in a poorer mode: see
/// [`Overlayfs::options`].
#[derive(Debug)]
pub struct Overlayfs {
    place: Place,
    options: OnceLock<OverlayOptions>,
}

impl Overlayfs {
    /// Roots in this place.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self { place, options: OnceLock::new() }
    }

    /// Which options it mounts with on this host and directory, found by trying.
    ///
    /// # Errors
    /// It could not be found out, or the file system has no attributes at all.
    pub fn options(&self) -> Result<OverlayOptions, Error> {
        if let Some(known) = self.options.get() {
            return Ok(*known);
        }
        let found = OverlayOptions::choose(self.place.dir())?;
        Ok(*self.options.get_or_init(|| found))
    }
}

impl RootBackend for Overlayfs {
    fn name(&self) -> &'static str {
        "overlayfs"
    }

    fn capabilities(&self) -> Result<Capabilities, Error> {
        let dir = self.place.dir();
        let mut found = Capabilities::new();
        let options = match self.options() {
            Ok(options) => options,
            Err(Error::Unsupported { missing, .. }) => {
                for capability in Capability::ALL {
                    found.set(capability, Support::No(missing.clone()));
                }
                return Ok(found);
            }
            Err(error) => return Err(error),
        };
        let scratch = Scratch::new(dir)?;
        let layers = |idmap: Option<BorrowedFd<'_>>, options, volatile| match scratch.mount(idmap, options, volatile) {
            Ok(_mount) => Ok(Support::Yes),
            Err(error) => support(&error, dir),
        };
        let roots = layers(None, options, false)?;
        let (id_mapped, unprivileged) = match probe::userns() {
            // What an owner of a user namespace would mount with, who needs nothing else.
            Ok(userns) => (
                layers(Some(userns.as_fd()), options, false)?,
                layers(None, OverlayOptions { index: false, ..OverlayOptions::UNPRIVILEGED }, false)?,
            ),
            Err(missing) => (Support::No(missing.clone()), Support::No(missing)),
        };
        let quota = quota::support(dir)?;
        found
            .set(Capability::IdMapped, id_mapped)
            .set(Capability::Volatile, layers(None, options, true)?)
            .set(Capability::Durable, roots.clone())
            .set(Capability::Snapshots, Support::No(Missing::Design("what a root added has to be copied".to_owned())))
            .set(Capability::QuotaBytes, quota.clone())
            .set(Capability::QuotaInodes, quota)
            .set(Capability::SharedCache, roots.clone())
            .set(Capability::SharedMmaps, roots.clone())
            .set(Capability::ConstantCreate, roots.clone())
            .set(Capability::ConstantDelete, roots.clone())
            .set(Capability::Unprivileged, unprivileged)
            .set(Capability::Roots, roots);
        Ok(found)
    }

    fn chosen_options(&self) -> Result<Option<String>, Error> {
        self.options().map(|options| Some(options.to_string()))
    }

    fn deviations(&self) -> &'static [Deviation] {
        use Deviation as D;
        match self.options() {
            Ok(OverlayOptions { userxattr: true, index: true, .. }) => {
                &[D::StaleMaps, D::FrozenAccessTimes, D::FilledHoles, D::NoDirectoryRename]
            }
            Ok(OverlayOptions { userxattr: true, .. }) => &[
                D::StaleMaps,
                D::FrozenAccessTimes,
                D::FilledHoles,
                D::BrokenHardLinks,
                D::NoDirectoryRename,
                D::UnnoticedUse,
            ],
            _ => &[D::StaleMaps, D::FrozenAccessTimes, D::FilledHoles],
        }
    }

    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error> {
        let mounting = self.options()?;
        let check = |dir: &Path| check_unused(id, dir, mounting, self.place.trash());
        let dir = record::claim(&self.place, base, id, options, check)?;
        note_base(&dir, base.path()).map_err(Error::io("make root", &dir))?;
        Ok(Box::new(Overlay::new(id.clone(), dir, base.clone(), options.policy, mounting, self.place.clone())))
    }

    fn remove(&self, id: &RootId) -> Result<(), Error> {
        let dir = self.place.dir().join(id.as_str());
        match fs::symlink_metadata(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("read root", &dir)(error)),
            Ok(_) => {}
        }
        check_before_removal(id, &dir, self.options()?, self.place.trash())?;
        self.place.discard(&dir)
    }

    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        record::list(&self.place)
    }

    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        record::find(&self.place, id)
    }
}
