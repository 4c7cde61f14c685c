//! Copies of roots in constant time.

use std::fmt;

use super::RootId;
use crate::Error;

/// What back ends add that can copy a root without copying its files.
pub trait Snapshots: fmt::Debug + Send + Sync {
    /// Makes the kept root `to` a copy of the kept root `of` as it is now, also
    /// while that is in use; from then on each changes alone. The copy has no
    /// quota until [`create`](super::RootBackend::create) sets one.
    ///
    /// # Errors
    /// [`Error::NoSuchRoot`] when there is no kept root `of`,
    /// [`Error::RootExists`] when there is a root `to`.
    fn snapshot(&self, of: &RootId, to: &RootId) -> Result<(), Error>;
}
