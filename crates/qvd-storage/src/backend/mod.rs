//! The contract between those who make writable roots and those who use them.

mod aufs;
mod base;
mod bound;
mod btrfs;
mod capability;
mod copy;
mod deviation;
mod exclusive;
mod fuse;
mod id;
mod layer;
pub(crate) mod looped;
mod lvm;
mod overlayfs;
mod place;
mod record;
mod registry;
mod reserve;
mod snapshots;

use std::{
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
};

use qvd_core::{Bytes, Digest, RootPolicy};
use serde::{Deserialize, Serialize};

pub(crate) use self::btrfs::delete_at as delete_subvolume_at;
pub use self::{
    aufs::{Aufs, AufsBranch, AufsOptions, AufsPermission},
    base::{BaseTree, Layer},
    btrfs::Btrfs,
    capability::{Capabilities, Capability},
    copy::{Bind, PlainCopy, Reflink},
    deviation::Deviation,
    fuse::Fuse,
    id::{RootId, RootIdError},
    looped::Looped,
    lvm::Lvm,
    overlayfs::{OverlayOptions, Overlayfs},
    place::Place,
    registry::{Backends, Factory},
    snapshots::Snapshots,
};
use crate::Error;

/// Keeps writable roots on base trees.
///
/// Calls may come from many threads at once. Two calls about the same root
/// have to be serialised by the caller, who knows what its desktop is doing.
pub trait RootBackend: fmt::Debug + Send + Sync {
    /// Name written to state files, so never changed once released.
    fn name(&self) -> &'static str;

    /// What this back end can do on *this* host, found by doing it.
    ///
    /// # Errors
    /// It could not be found out: a full disk says nothing about the host.
    fn capabilities(&self) -> Result<Capabilities, Error>;

    /// With which options it mounts here, of those that it chose by trying; for a
    /// person. Most have nothing to choose.
    ///
    /// # Errors
    /// It could not be found out.
    fn chosen_options(&self) -> Result<Option<String>, Error> {
        Ok(None)
    }

    /// In what its roots differ from a plain directory, by their nature. The
    /// conformance suite checks that it is in exactly this.
    fn deviations(&self) -> &'static [Deviation];

    /// Makes a root on `base`, or finds the one that is there: also that of a
    /// desktop which a killed process left running, so nothing in it changes.
    ///
    /// # Errors
    /// [`Error::OtherBase`] when a persistent root stands on another image,
    /// [`Error::Unsupported`] when the host lacks something, also for a quota
    /// that would not hold.
    fn create(&self, base: &BaseTree, id: &RootId, options: &RootOptions) -> Result<Box<dyn Root>, Error>;

    /// Removes a root for good. Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// [`Error::RootBusy`] while something has it mounted.
    fn remove(&self, id: &RootId) -> Result<(), Error>;

    /// Every root on this host, by name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// The directory of roots cannot be read.
    fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error>;

    /// Whether there is a root of that name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// As [`RootBackend::roots`].
    fn find(&self, id: &RootId) -> Result<Option<RootPolicy>, Error> {
        Ok(self.roots()?.into_iter().find_map(|(found, policy)| (found == *id).then_some(policy)))
    }

    /// Forgets what is kept of bases for roots to come, of those that `gone` says are of
    /// no more use. Roots that there are do not notice, and a base that is used
    /// again is only slower at first.
    ///
    /// # Errors
    /// What is kept cannot be read or taken out of the way.
    fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        let _ = gone;
        Ok(())
    }

    /// How to copy roots in constant time, for back ends that can.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
}

/// The writable file tree of one desktop.
#[must_use = "dropping it keeps the root on disk, also a volatile one"]
pub trait Root: fmt::Debug + Send + Sync {
    /// Which root this is.
    fn id(&self) -> &RootId;

    /// Makes a detached mount of the root; a volatile one begins from the base
    /// anew. With `idmap`, owners show shifted by that user namespace's maps.
    /// The mount is in no mount table and gone once it is closed everywhere.
    ///
    /// # Errors
    /// [`Error::RootBusy`] when it is mounted already, [`Error::Unsupported`]
    /// when this host cannot do it.
    fn mount(&self, idmap: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error>;

    /// Whether what makes the root work still does: a program that serves its
    /// files, space that it shares with others. Most roots need nothing.
    ///
    /// # Errors
    /// What is wrong, for instance [`Error::ServerDied`].
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Says that nobody uses the root any more: a volatile one is forgotten, a
    /// persistent one kept. Closing again is `Ok`; after an error, closing
    /// again tries again.
    ///
    /// # Errors
    /// [`Error::RootBusy`] while something still has it mounted.
    fn close(&mut self) -> Result<(), Error>;
}

/// How a root is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RootOptions {
    /// What becomes of it at a stop.
    pub policy: RootPolicy,
    /// What it may add to its base.
    pub quota: Quota,
}

impl From<RootPolicy> for RootOptions {
    /// Without a quota.
    fn from(policy: RootPolicy) -> Self {
        Self { policy, quota: Quota::default() }
    }
}

/// What a root may add to its base. `None` means as much as there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Bytes of file content and metadata, as the file system counts them.
    pub bytes: Option<Bytes>,
    /// Files, directories and links.
    pub inodes: Option<u64>,
}

impl Quota {
    /// Whether nothing is limited.
    #[must_use]
    pub const fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.inodes.is_none()
    }
}
