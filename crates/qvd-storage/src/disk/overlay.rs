//! Disks that are qcow2 files with their base behind them.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, Missing, Support};

use super::{
    BaseDisk, DiskCapability, DiskFormat, DiskId, DiskReport,
    files::{self, Files, Make, delegate},
    qcow2::{self, BackingPolicy, Chain},
};
use crate::{Error, Place};

/// Disks that are qcow2 files: a base of any size is behind any number of
/// them, and each takes the space of what is written to it. No program is
/// called for any of it.
#[derive(Debug)]
pub struct Qcow2(Files<Overlay>);

impl Qcow2 {
    /// Disks in this place, on bases that have no file behind them.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self::with_policy(place, BackingPolicy::nothing())
    }

    /// Disks in this place, on bases that may have those files behind them
    /// that `policy` names; a base itself is allowed by being given.
    #[must_use]
    pub const fn with_policy(place: Place, policy: BackingPolicy) -> Self {
        Self(Files::new(place, Overlay { policy }))
    }

    /// The file of a disk, if there is one.
    pub(crate) fn file(&self, id: &DiskId) -> PathBuf {
        self.0.file(id)
    }

    fn probe(&self) -> Result<super::DiskCapabilities, Error> {
        let mut found = files::capabilities(self.0.place(), &Support::Yes)?;
        for capability in [DiskCapability::Resize, DiskCapability::Commit, DiskCapability::Rebase] {
            found.set(capability, Support::No(Missing::Design(READ_ONLY.to_owned())));
        }
        Ok(found)
    }
}

delegate!(Qcow2, "qcow2", &[]);

/// What is not offered, and why.
const READ_ONLY: &str = "qcow2 files are made and read, but written to by virtual machines alone";

#[derive(Debug, Clone)]
struct Overlay {
    policy: BackingPolicy,
}

impl Overlay {
    /// What may be behind a disk on this base.
    fn permitted(&self, base: &BaseDisk) -> Result<BackingPolicy, Error> {
        self.policy.clone().with_file(base.path())
    }
}

impl Make for Overlay {
    const FILE: &'static str = "disk.qcow2";
    const FORMAT: DiskFormat = DiskFormat::Qcow2;
    const ON_BASE: bool = true;

    fn make(&self, base: &BaseDisk, size: Option<Bytes>, to: &File, path: &Path) -> Result<(), Error> {
        let real = base.path().canonicalize().map_err(Error::io("open base", base.path()))?;
        // Opened with all that is behind it: a disk that cannot be used is not made.
        let behind = Chain::open(&real, base.format(), &self.policy)?;
        let size = files::size_on(behind.size(), size)?;
        qcow2::write_new(to, path, size, Some((&real, base.format())))
    }

    fn size(&self, base: &BaseDisk, path: &Path) -> Result<u64, Error> {
        Ok(Chain::open(path, DiskFormat::Qcow2, &self.permitted(base)?)?.size())
    }

    fn check(&self, base: &BaseDisk, path: &Path, report: &mut DiskReport) -> Result<(), Error> {
        report.size = Bytes::new(self.size(base, path)?);
        Ok(())
    }

    fn grow(&self, _: &BaseDisk, _: &Path, _: u64) -> Result<(), Error> {
        Err(Error::Unsupported { op: "resize a disk", missing: Missing::Design(READ_ONLY.to_owned()) })
    }
}
