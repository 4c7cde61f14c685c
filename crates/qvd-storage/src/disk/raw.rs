//! Disks that are raw copies of their base, plain or sharing its extents.

use std::{fs::File, path::Path};

use qvd_core::{Bytes, Missing, Support};
use rustix::io::Errno;

use super::{
    BaseDisk, DiskCapabilities, DiskCapability, DiskDeviation, DiskFormat, DiskReport,
    files::{self, Files, Make, delegate},
    qcow2::{BackingPolicy, Chain},
};
use crate::{Error, Place, copytree::Content, probe};

/// Disks that are copies, with holes where the base has holes or zeros: they
/// work on every file system, and need nothing of whoever reads them.
#[derive(Debug)]
pub struct RawCopy(Files<Copy>);

/// Disks that share their extents with the base until they are written, on XFS
/// and btrfs: raw files at almost the price of an overlay.
#[derive(Debug)]
pub struct RawReflink(Files<Share>);

impl RawCopy {
    /// Disks in this place, on bases that have no file behind them.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self::with_policy(place, BackingPolicy::nothing())
    }

    /// Disks in this place, on bases that may have those files behind them
    /// that `policy` names.
    #[must_use]
    pub const fn with_policy(place: Place, policy: BackingPolicy) -> Self {
        Self(Files::new(place, Copy { policy }))
    }

    fn probe(&self) -> Result<DiskCapabilities, Error> {
        let mut found = capabilities(self.0.place(), &Support::Yes)?;
        let copied = Support::No(Missing::Design("all of the base is copied".to_owned()));
        found.set(DiskCapability::ConstantCreate, copied.clone()).set(DiskCapability::Thin, copied);
        Ok(found)
    }
}

impl RawReflink {
    /// Disks in this place. Bases have to be raw files on its file system.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self(Files::new(place, Share))
    }

    fn probe(&self) -> Result<DiskCapabilities, Error> {
        let dir = self.0.place().dir();
        let works = probe::reflink(dir).map_err(Error::io("probe reflink below", dir))?;
        let mut found = capabilities(self.0.place(), &works)?;
        if works.is_yes() {
            // By the number of its extents, which is small for what nobody wrote to at random.
            let why = "it takes longer the more fragments the base has".to_owned();
            found.set(DiskCapability::ConstantCreate, Support::No(Missing::Design(why)));
        }
        Ok(found)
    }
}

delegate!(RawCopy, "copy", &[]);
delegate!(RawReflink, "reflink", &[DiskDeviation::RawBasesOnly]);

fn capabilities(place: &Place, works: &Support) -> Result<DiskCapabilities, Error> {
    let mut found = files::capabilities(place, works)?;
    if works.is_yes() {
        let apart = Support::No(Missing::Design("a copy does not know its base".to_owned()));
        found.set(DiskCapability::Commit, apart.clone()).set(DiskCapability::Rebase, apart);
        let own = "each disk has a file, and so pages, of its own".to_owned();
        found.set(DiskCapability::SharedCache, Support::No(Missing::Design(own)));
        found.set(DiskCapability::Discard, files::holes(place.dir())?);
    }
    Ok(found)
}

#[derive(Debug, Clone)]
struct Copy {
    policy: BackingPolicy,
}

#[derive(Debug, Clone)]
struct Share;

impl Make for Copy {
    const FILE: &'static str = "disk.raw";
    const FORMAT: DiskFormat = DiskFormat::Raw;

    fn make(&self, base: &BaseDisk, size: Option<Bytes>, to: &File, path: &Path) -> Result<(), Error> {
        let mut chain = Chain::open(base.path(), base.format(), &self.policy)?;
        let size = files::size_on(chain.size(), size)?;
        match base.format() {
            DiskFormat::Raw => {
                let from = File::open(base.path()).map_err(Error::io("open base", base.path()))?;
                Content::Copied.fill(&from, to, chain.size()).map_err(Error::io("copy disk to", path))?;
            }
            DiskFormat::Qcow2 => chain.copy_to(to, path)?,
        }
        to.set_len(size).map_err(Error::io("make disk", path))
    }

    fn size(&self, _: &BaseDisk, path: &Path) -> Result<u64, Error> {
        length(path)
    }

    fn check(&self, base: &BaseDisk, path: &Path, report: &mut DiskReport) -> Result<(), Error> {
        check(Chain::open(base.path(), base.format(), &self.policy)?.size(), path, report)
    }

    fn grow(&self, _: &BaseDisk, path: &Path, size: u64) -> Result<(), Error> {
        grow(path, size)
    }

    fn discard(&self, _: &BaseDisk, path: &Path, at: u64, length: u64) -> Result<(), Error> {
        discard(path, at, length)
    }
}

impl Make for Share {
    const FILE: &'static str = "disk.raw";
    const FORMAT: DiskFormat = DiskFormat::Raw;

    fn make(&self, base: &BaseDisk, size: Option<Bytes>, to: &File, path: &Path) -> Result<(), Error> {
        let missing = match base.format() {
            DiskFormat::Raw => {
                let from = File::open(base.path()).map_err(Error::io("open base", base.path()))?;
                let bytes = from.metadata().map_err(Error::io("open base", base.path()))?.len();
                let size = files::size_on(bytes, size)?;
                match Content::Shared.fill(&from, to, bytes) {
                    Ok(()) => return to.set_len(size).map_err(Error::io("make disk", path)),
                    Err(error) => match Errno::from_io_error(&error) {
                        Some(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY) => {
                            Missing::Filesystem("reflink from the base to the disk".to_owned())
                        }
                        _ => return Err(Error::io("make disk", path)(error)),
                    },
                }
            }
            format => Missing::Design(format!("a base in format {format} cannot be shared as a raw disk")),
        };
        Err(Error::Unsupported { op: "make a disk", missing })
    }

    fn size(&self, _: &BaseDisk, path: &Path) -> Result<u64, Error> {
        length(path)
    }

    fn check(&self, base: &BaseDisk, path: &Path, report: &mut DiskReport) -> Result<(), Error> {
        check(length(base.path())?, path, report)
    }

    fn grow(&self, _: &BaseDisk, path: &Path, size: u64) -> Result<(), Error> {
        grow(path, size)
    }

    fn discard(&self, _: &BaseDisk, path: &Path, at: u64, length: u64) -> Result<(), Error> {
        discard(path, at, length)
    }
}

fn length(path: &Path) -> Result<u64, Error> {
    std::fs::metadata(path).map(|about| about.len()).map_err(Error::io("read disk", path))
}

/// All that can be said of a raw disk: whether it was cut off.
fn check(base: u64, path: &Path, report: &mut DiskReport) -> Result<(), Error> {
    let size = length(path)?;
    report.size = Bytes::new(size);
    if size < base {
        report.errors = 1;
        report.findings.push(format!("it has {size} bytes, fewer than its base, {base}"));
    }
    Ok(())
}

fn grow(path: &Path, size: u64) -> Result<(), Error> {
    let grow = || {
        let file = File::options().write(true).open(path)?;
        file.set_len(size)?;
        file.sync_all()
    };
    grow().map_err(Error::io("resize disk", path))
}

fn discard(path: &Path, at: u64, length: u64) -> Result<(), Error> {
    let discard = || {
        let file = File::options().write(true).open(path)?;
        files::zero(&file, at, length)?;
        file.sync_all()
    };
    discard().map_err(Error::io("discard part of disk", path))
}
