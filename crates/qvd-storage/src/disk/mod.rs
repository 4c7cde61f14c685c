//! The contract between those who make writable disks and those who use them.

mod base;
mod capability;
mod files;
mod id;
mod lock;
mod lvm;
mod on_base;
mod overlay;
pub mod qcow2;
mod raw;
mod record;
mod registry;
mod survey;

use std::{fmt, path::PathBuf};

use qvd_core::{Bytes, Digest, RootPolicy};
use serde::{Deserialize, Serialize};

pub use self::{
    base::{BaseDisk, DiskFormat, DiskFormatError},
    capability::{DiskCapabilities, DiskCapability, DiskDeviation},
    id::{DiskId, DiskIdError},
    lvm::LvmDisks,
    on_base::OnBase,
    overlay::Qcow2,
    raw::{RawCopy, RawReflink},
    registry::{DiskBackends, DiskFactory},
    survey::{DiskSurvey, SurveyedDisks},
};
use crate::Error;

/// Keeps writable disks on base disks.
///
/// Calls may come from many threads at once. Two calls about the same disk
/// have to be serialised by the caller, who knows what its desktop is doing.
pub trait DiskBackend: fmt::Debug + Send + Sync {
    /// Name written to state files, so never changed once released.
    fn name(&self) -> &'static str;

    /// What this back end can do on *this* host, found by doing it.
    ///
    /// # Errors
    /// It could not be found out: a full file system says nothing about the host.
    fn capabilities(&self) -> Result<DiskCapabilities, Error>;

    /// In what its disks differ from others, by their nature. The conformance
    /// suite checks that it is in exactly this.
    fn deviations(&self) -> &'static [DiskDeviation];

    /// Makes a disk on `base`, or finds the one that is there: also that of a
    /// desktop which a killed process left running, so nothing in it changes.
    ///
    /// # Errors
    /// [`Error::OtherBaseDisk`] when a kept disk stands on another image,
    /// [`Error::Unsupported`] when the host lacks something, and for a size
    /// smaller than the base, or other than that of the kept disk.
    fn create(&self, base: &BaseDisk, id: &DiskId, options: &DiskOptions) -> Result<Box<dyn Disk>, Error>;

    /// Removes a disk for good. Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it.
    fn remove(&self, id: &DiskId) -> Result<(), Error>;

    /// Every disk on this host, by name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// Where disks are cannot be read.
    fn disks(&self) -> Result<Vec<(DiskId, RootPolicy)>, Error>;

    /// Whether there is a disk of that name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// As [`DiskBackend::disks`].
    fn find(&self, id: &DiskId) -> Result<Option<RootPolicy>, Error> {
        Ok(self.disks()?.into_iter().find_map(|(found, policy)| (found == *id).then_some(policy)))
    }

    /// Forgets what is kept of bases for disks to come: see
    /// [`RootBackend::forget_bases`](crate::RootBackend::forget_bases).
    ///
    /// # Errors
    /// What is kept cannot be read or taken out of the way.
    fn forget_bases(&self, gone: &dyn Fn(Digest) -> bool) -> Result<(), Error> {
        let _ = gone;
        Ok(())
    }
}

/// The writable disk of one desktop.
#[must_use = "dropping it keeps the disk, also a volatile one"]
pub trait Disk: fmt::Debug + Send + Sync {
    /// Which disk this is.
    fn id(&self) -> &DiskId;

    /// Makes the disk ready for a virtual machine; a volatile one begins from
    /// the base anew, but for the first time after it was made.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] when a virtual machine has it already,
    /// [`Error::DiskFile`] when it, or what is behind it, is damaged or not permitted.
    fn attach(&self) -> Result<Device, Error>;

    /// Looks whether everything in it is consistent, and how large it is.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it; it cannot be read.
    fn check(&self) -> Result<DiskReport, Error>;

    /// Makes a disk larger; the new part reads as zeros.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it, [`Error::Unsupported`]
    /// for a smaller size: what is behind the new end would be lost.
    fn resize(&self, size: Bytes) -> Result<(), Error>;

    /// Makes bytes of the disk zero, and gives back the space of what holds nothing else.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it, [`Error::Refused`] for
    /// bytes that it does not have; it cannot be written.
    fn discard(&self, at: Bytes, length: Bytes) -> Result<(), Error>;

    /// How to write the disk to its base or to put it on another one, for disks
    /// that have their base behind them.
    fn on_base(&self) -> Option<&dyn OnBase> {
        None
    }

    /// Says that nobody uses the disk any more: a volatile one is forgotten, a
    /// kept one kept. Closing again is `Ok`; after an error, closing again tries again.
    ///
    /// # Errors
    /// [`Error::DiskBusy`] while a virtual machine has it.
    fn close(&mut self) -> Result<(), Error>;
}

/// What to give to a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Device {
    /// A file or block device.
    pub path: PathBuf,
    /// How the disk is in it; to be said, not guessed.
    pub format: DiskFormat,
    /// Size of the disk.
    pub size: Bytes,
    /// What shows where nothing was written, when that is another file. It is
    /// to be opened by this, never by what the disk says of itself.
    pub backing: Option<BaseDisk>,
}

impl Device {
    /// A device for a back end to hand out, with nothing behind it.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, format: DiskFormat, size: Bytes) -> Self {
        Self { path: path.into(), format, size, backing: None }
    }

    /// With this behind it.
    #[must_use]
    pub fn on(self, base: BaseDisk) -> Self {
        Self { backing: Some(base), ..self }
    }
}

/// How a disk is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskOptions {
    /// What becomes of it at a stop.
    pub policy: RootPolicy,
    /// Its size, a multiple of 512 bytes; that of the base if not said.
    pub size: Option<Bytes>,
}

impl From<RootPolicy> for DiskOptions {
    /// As large as the base.
    fn from(policy: RootPolicy) -> Self {
        Self { policy, size: None }
    }
}

/// What a look at a disk found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct DiskReport {
    /// Size of the disk.
    pub size: Bytes,
    /// Space that it takes on its file system, its base not counted.
    pub used: Bytes,
    /// How many contradictions there are: what is on it cannot be trusted.
    pub errors: u64,
    /// How many clusters are taken and not used: space is lost, nothing else.
    pub leaks: u64,
    /// The first of what was found, in lines for a person.
    pub findings: Vec<String>,
}
