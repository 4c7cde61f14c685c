//! What every back end keeps of a root beside its files, and the directory
//! that both are in.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use qvd_core::{Digest, RootPolicy};
use serde::{Deserialize, Serialize};

use super::{BaseTree, Place, Quota, RootId, RootOptions};
use crate::{Error, fsio, quota};

const RECORD: &str = "root.json";

/// What is kept of a persistent root. A volatile one has no record: nothing of
/// it outlives its desktop, so nothing is synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) base: Digest,
    #[serde(default)]
    pub(crate) quota: Quota,
}

impl Record {
    pub(crate) const fn new(base: &BaseTree, options: &RootOptions) -> Self {
        Self { base: base.digest(), quota: options.quota }
    }

    /// The record in a root's directory, if it is a persistent root's.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let read = || match fs::read(dir.join(RECORD)) {
            Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        read().map_err(Error::io("read root", dir))
    }

    /// Writes it, so that it is there whole after any crash.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Error> {
        let write = || {
            fsio::replace(&dir.join(RECORD), &serde_json::to_vec(self)?)?;
            dir.parent().map_or(Ok(()), fsio::sync_dir)
        };
        write().map_err(Error::io("record root", dir))
    }

    /// Refuses another base than the one that the root was made on.
    pub(crate) fn expect_base(&self, id: &RootId, base: &BaseTree) -> Result<(), Error> {
        if self.base == base.digest() {
            return Ok(());
        }
        Err(Error::OtherBase { root: id.clone(), has: self.base, wanted: base.digest() })
    }
}

/// The directory of a root whose files are added to as they come: made, or found
/// as what was asked for left it. What another policy left goes, once
/// `expect_unused` has said that nobody uses it.
pub(super) fn claim(
    place: &Place,
    base: &BaseTree,
    id: &RootId,
    options: &RootOptions,
    expect_unused: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let dir = place.dir().join(id.as_str());
    let make = || fsio::ensure_private_dir(&dir).map_err(Error::io("make root", &dir));
    make()?;
    let mut had = Record::read(&dir)?;
    match (&had, options.policy) {
        (None, RootPolicy::Volatile) => {}
        (Some(had), RootPolicy::Persistent) => had.expect_base(id, base)?,
        _ => {
            // It is not what this policy promises: what a volatile root wrote may
            // lack anything after a crash.
            expect_unused(&dir)?;
            place.discard(&dir)?;
            make()?;
            had = None;
        }
    }
    quota::renew(&dir, had.as_ref().map(|record| record.quota), options.quota)?;
    let record = Record::new(base, options);
    if options.policy == RootPolicy::Persistent && had.as_ref() != Some(&record) {
        record.write(&dir)?;
    }
    Ok(dir)
}

/// Every root that has a directory of its name in the place.
pub(crate) fn list(place: &Place) -> Result<Vec<(RootId, RootPolicy)>, Error> {
    let io = Error::io("read roots in", place.dir());
    let names = fs::read_dir(place.dir()).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(io)?;
    let mut found = Vec::new();
    for id in names.iter().filter_map(|entry| entry.file_name().to_str()?.parse::<RootId>().ok()) {
        // One that is removed meanwhile is not there, which is the truth.
        if let Some(policy) = find(place, &id)? {
            found.push((id, policy));
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found)
}

/// What becomes of a root at a stop, if there is one of that name.
pub(crate) fn find(place: &Place, id: &RootId) -> Result<Option<RootPolicy>, Error> {
    let dir = place.dir().join(id.as_str());
    let there = |path: &Path| path.try_exists().map_err(Error::io("read root", path));
    if !there(&dir)? {
        return Ok(None);
    }
    // A record that cannot be read is still one: somebody's files are there.
    Ok(Some(if there(&dir.join(RECORD))? { RootPolicy::Persistent } else { RootPolicy::Volatile }))
}
