//! What every back end keeps of a disk beside its data, and the directory that
//! both are in.

use std::{fs, io, path::Path};

use qvd_core::{Digest, RootPolicy};
use serde::{Deserialize, Serialize};

use super::{BaseDisk, DiskId};
use crate::{Error, Place, fsio};

const RECORD: &str = "disk.json";

/// What is kept of a persistent disk. A volatile one has no record: nothing of
/// it outlives its desktop, so nothing is synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) base: Digest,
    /// What it was being put on when that was written last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<Digest>,
}

impl Record {
    pub(crate) const fn new(base: &BaseDisk) -> Self {
        Self { base: base.digest(), next: None }
    }

    /// The record in a disk's directory, if it is a kept disk's.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let read = || match fs::read(dir.join(RECORD)) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        read().map_err(Error::io("read disk", dir))
    }

    /// Writes it, so that it is there whole after any crash.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Error> {
        let write = || fsio::replace(&dir.join(RECORD), &serde_json::to_vec(self)?);
        write().map_err(Error::io("record disk", dir))
    }

    /// Refuses another base than the one that the disk was made on.
    pub(crate) fn expect_base(&self, id: &DiskId, base: &BaseDisk) -> Result<(), Error> {
        if self.base == base.digest() {
            return Ok(());
        }
        Err(Error::OtherBaseDisk { disk: id.clone(), has: self.base, wanted: base.digest() })
    }
}

/// Every disk that has a directory of its name in the place.
pub(crate) fn list(place: &Place) -> Result<Vec<(DiskId, RootPolicy)>, Error> {
    let io = Error::io("read disks in", place.dir());
    let names = fs::read_dir(place.dir()).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(io)?;
    let mut found = Vec::new();
    for id in names.iter().filter_map(|entry| entry.file_name().to_str()?.parse::<DiskId>().ok()) {
        // One that is removed meanwhile is not there, which is the truth.
        if let Some(policy) = find(place, &id)? {
            found.push((id, policy));
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

/// What becomes of a disk at a stop, if there is one of that name.
pub(crate) fn find(place: &Place, id: &DiskId) -> Result<Option<RootPolicy>, Error> {
    let dir = place.dir().join(id.as_str());
    let there = |path: &Path| path.try_exists().map_err(Error::io("read disk", path));
    if !there(&dir)? {
        return Ok(None);
    }
    // A record that cannot be read is still one: somebody's files are there.
    Ok(Some(if there(&dir.join(RECORD))? { RootPolicy::Persistent } else { RootPolicy::Volatile }))
}
