//! Disks that are qcow2 files with their base behind them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use qvd_core::{Bytes, Support};

use super::{
    BaseDisk, DiskCapability, DiskFormat, DiskId, DiskReport,
    files::{self, Files, Make, delegate},
    qcow2::{self, BackingPolicy, Chain, Rebase, Repair, Shrink, Writer},
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
        try_changes(self.0.place().dir())?;
        found.set(DiskCapability::Discard, files::holes(self.0.place().dir())?);
        Ok(found)
    }
}

delegate!(Qcow2, "qcow2", &[]);

/// Makes a small disk in `dir` and does with it all that can be done with one:
/// on a directory where disks can be made, an error says nothing about the host.
fn try_changes(dir: &Path) -> Result<(), Error> {
    const BYTES: u64 = 1 << 20;
    let io = |error: io::Error| Error::io("try disks below", dir)(error);
    let scratch = tempfile::Builder::new().prefix(".new-").tempdir_in(dir).map_err(io)?;
    let (base, disk) = (scratch.path().join("base"), scratch.path().join("disk"));
    let policy = BackingPolicy::nothing().with_dir(scratch.path())?;
    qcow2::create(&base, BYTES, None)?;
    qcow2::create(&disk, BYTES, Some((&base, DiskFormat::Qcow2)))?;
    qcow2::resize(&disk, 2 * BYTES, Shrink::Never, &policy)?;
    qcow2::commit(&disk, &policy)?;
    qcow2::rebase(&disk, None, Rebase::Safe, &policy)?;
    scratch.close().map_err(io)
}

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
        // What is behind has to be there as well, and be permitted.
        report.size = Bytes::new(self.size(base, path)?);
        let found = qcow2::check(path, Repair::Nothing)?;
        (report.errors, report.leaks, report.findings) = (found.errors, found.leaks, found.findings);
        Ok(())
    }

    fn grow(&self, base: &BaseDisk, path: &Path, size: u64) -> Result<(), Error> {
        qcow2::resize(path, size, Shrink::Never, &self.permitted(base)?)
    }

    fn discard(&self, base: &BaseDisk, path: &Path, at: u64, length: u64) -> Result<(), Error> {
        let mut disk = Writer::open(path, &self.permitted(base)?)?;
        let discarded = disk.discard(at, length);
        // Refused or done, it is in order.
        disk.finish().and(discarded)
    }

    fn behind(&self) -> Option<&BackingPolicy> {
        Some(&self.policy)
    }
}
