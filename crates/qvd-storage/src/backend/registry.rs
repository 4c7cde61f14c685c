//! Back ends by name: those that come with this crate and an integrator's own.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{Aufs, Bind, Btrfs, Fuse, Looped, Lvm, Overlayfs, Place, PlainCopy, Reflink, RootBackend};
use crate::Error;

/// Makes a back end that keeps its roots in a place. It may be called on a
/// host where the back end cannot work: what is missing is for
/// [`RootBackend::capabilities`] to say.
pub type Factory = dyn Fn(Place) -> Result<Box<dyn RootBackend>, Error> + Send + Sync;

/// Ways to make roots, by the names that state files use.
///
/// ```
/// use qvd_storage::{Backends, Overlayfs};
///
/// let mut backends = Backends::built_in();
/// backends.add("mine", |place| Ok(Box::new(Overlayfs::new(place))));
/// assert!(backends.names().any(|name| name == "mine"));
/// ```
#[derive(Clone)]
pub struct Backends(BTreeMap<&'static str, Arc<Factory>>);

impl Backends {
    /// What a root is made by when nobody chooses.
    pub const DEFAULT: &'static str = "overlayfs";

    /// Those that come with this crate.
    #[must_use]
    pub fn built_in() -> Self {
        let mut all = Self(BTreeMap::new());
        all.add("aufs", |place| Ok(Box::new(Aufs::new(place))));
        all.add("bind", |place| Ok(Box::new(Bind::new(place))));
        all.add("btrfs", |place| Ok(Box::new(Btrfs::new(place))));
        all.add("copy", |place| Ok(Box::new(PlainCopy::new(place))));
        all.add("fuse", |place| Ok(Box::new(Fuse::overlay(place))));
        all.add("loop", |place| Ok(Box::new(Looped::new(place))));
        all.add("lvm", |place| Ok(Box::new(Lvm::new(place))));
        all.add("overlayfs", |place| Ok(Box::new(Overlayfs::new(place))));
        all.add("reflink", |place| Ok(Box::new(Reflink::new(place))));
        all.add("unionfs-fuse", |place| Ok(Box::new(Fuse::unionfs(place))));
        all
    }

    /// Adds one, or puts it in the place of the one that had the name: up to
    /// 64 of `a-z 0-9 _ -`, which becomes the name of a directory.
    pub fn add(
        &mut self,
        name: &'static str,
        factory: impl Fn(Place) -> Result<Box<dyn RootBackend>, Error> + Send + Sync + 'static,
    ) -> &mut Self {
        self.0.insert(name, Arc::new(factory));
        self
    }

    /// Every name, in the order of the alphabet.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.0.keys().copied()
    }

    /// Makes the back end `name` with its roots in a place.
    ///
    /// # Errors
    /// [`Error::NoSuchBackend`], or what its factory reports.
    pub fn make(&self, name: &str, place: Place) -> Result<Box<dyn RootBackend>, Error> {
        self.factory(name)?(place)
    }

    pub(crate) fn factory(&self, name: &str) -> Result<&Factory, Error> {
        self.0.get(name).map(AsRef::as_ref).ok_or_else(|| Error::NoSuchBackend {
            name: name.to_owned(),
            known: self.names().map(str::to_owned).collect(),
        })
    }
}

impl Default for Backends {
    fn default() -> Self {
        Self::built_in()
    }
}

impl fmt::Debug for Backends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}
