//! Ways to make disks by name: those of this crate and an integrator's own.

use std::{collections::BTreeMap, fmt, sync::Arc};

use super::{DiskBackend, LvmDisks, Qcow2, RawCopy, RawReflink};
use crate::{Error, Place};

/// Makes a back end that keeps its disks in a place. It may be called on a
/// host where the back end cannot work: what is missing is for
/// [`DiskBackend::capabilities`] to say.
pub type DiskFactory = dyn Fn(Place) -> Result<Box<dyn DiskBackend>, Error> + Send + Sync;

/// Ways to make disks, by the names that state files use.
///
/// ```
/// use qvd_storage::{DiskBackends, Qcow2};
///
/// let mut backends = DiskBackends::built_in();
/// backends.add("mine", |place| Ok(Box::new(Qcow2::new(place))));
/// assert!(backends.names().any(|name| name == "mine"));
/// ```
#[derive(Clone)]
pub struct DiskBackends(BTreeMap<&'static str, Arc<DiskFactory>>);

impl DiskBackends {
    /// What a disk is made by when nobody chooses.
    pub const DEFAULT: &'static str = "qcow2";

    /// Those that come with this crate.
    #[must_use]
    pub fn built_in() -> Self {
        let mut all = Self(BTreeMap::new());
        all.add("copy", |place| Ok(Box::new(RawCopy::new(place))));
        all.add("lvm", |place| Ok(Box::new(LvmDisks::new(place))));
        all.add("qcow2", |place| Ok(Box::new(Qcow2::new(place))));
        all.add("reflink", |place| Ok(Box::new(RawReflink::new(place))));
        all
    }

    /// Adds one, or puts it in the place of the one that had the name: up to
    /// 64 of `a-z 0-9 _ -`, which becomes the name of a directory.
    pub fn add(
        &mut self,
        name: &'static str,
        factory: impl Fn(Place) -> Result<Box<dyn DiskBackend>, Error> + Send + Sync + 'static,
    ) -> &mut Self {
        self.0.insert(name, Arc::new(factory));
        self
    }

    /// Every name, in the order of the alphabet.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.0.keys().copied()
    }

    /// Makes the back end `name` with its disks in a place.
    ///
    /// # Errors
    /// [`Error::NoSuchBackend`], or what its factory reports.
    pub fn make(&self, name: &str, place: Place) -> Result<Box<dyn DiskBackend>, Error> {
        let factory = self.0.get(name).ok_or_else(|| Error::NoSuchBackend {
            name: name.to_owned(),
            known: self.names().map(str::to_owned).collect(),
        })?;
        factory(place)
    }
}

impl Default for DiskBackends {
    fn default() -> Self {
        Self::built_in()
    }
}

impl fmt::Debug for DiskBackends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}
