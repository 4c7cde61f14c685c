//! Disks that are files with their base behind them.

use std::{fs::File, io, path::Path, sync::PoisonError};

use qvd_core::RootPolicy;

use super::{FileDisk, Files, Make};
use crate::{
    Error,
    disk::{
        BaseDisk, DiskId, OnBase,
        qcow2::{self, BackingPolicy, Image, Rebase},
        record::{self, Record},
    },
};

impl<M: Make> OnBase for FileDisk<M> {
    fn commit(&self) -> Result<(), Error> {
        self.files.expect_unused(&self.id)?;
        let base = self.base();
        self.files.expect_alone(&self.id, &base)?;
        let policy = self.policy()?.with_file(base.path())?;
        qcow2::commit(&self.files.file(&self.id), &policy)
    }

    fn rebase(&self, to: &BaseDisk, how: Rebase) -> Result<(), Error> {
        self.files.expect_unused(&self.id)?;
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        let mut policy = self.policy()?.with_file(to.path())?;
        // The one that it leaves need not be there when nobody reads it.
        if how == Rebase::Safe {
            policy = policy.with_file(base.path())?;
        }
        let (dir, path) = (self.files.dir(&self.id), self.files.file(&self.id));
        let kept = self.options.policy == RootPolicy::Persistent;
        if kept {
            // Which of both it is, the file itself says from here on.
            Record { base: base.digest(), next: Some(to.digest()) }.write(&dir)?;
        }
        let changed = qcow2::rebase(&path, Some((to.path(), to.format())), how, &policy);
        if stands_on(&path, to)? {
            *base = to.clone();
        }
        if kept {
            Record::new(&base).write(&dir)?;
        }
        changed
    }
}

impl<M: Make> FileDisk<M> {
    fn policy(&self) -> Result<BackingPolicy, Error> {
        let policy = self.files.making.behind().cloned();
        policy.ok_or_else(|| Error::Refused(format!("disk {} has no base behind it", self.id)))
    }
}

impl<M: Make> Files<M> {
    /// Refuses another base than the one that a kept disk stands on, and
    /// says which that is when a process was killed while it changed it.
    pub(super) fn expect_base(&self, id: &DiskId, base: &BaseDisk) -> Result<(), Error> {
        let dir = self.dir(id);
        let Some(mut record) = Record::read(&dir)? else { return Ok(()) };
        if let Some(next) = record.next {
            let has = if stands_on(&self.file(id), base)? {
                base.digest()
            } else if base.digest() == next {
                record.base
            } else {
                next
            };
            if [record.base, next].contains(&has) {
                record = Record { base: has, next: None };
                record.write(&dir)?;
            }
        }
        record.expect_base(id, base)
    }

    /// Refuses a base that another disk of the place stands on.
    fn expect_alone(&self, id: &DiskId, base: &BaseDisk) -> Result<(), Error> {
        for (other, _) in record::list(&self.place)? {
            if other != *id && stands_on(&self.file(&other), base)? {
                return Err(Error::BaseShared { disk: other, base: base.path().to_path_buf() });
            }
        }
        Ok(())
    }
}

/// Whether the file of a disk says that this is behind it; one that is gone
/// meanwhile stands on nothing.
fn stands_on(disk: &Path, base: &BaseDisk) -> Result<bool, Error> {
    let file = match File::open(disk) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file.map_err(Error::io("open disk", disk))?,
    };
    let image = Image::open(file, disk)?;
    let real = base.path().canonicalize().map_err(Error::io("open base", base.path()))?;
    Ok(image.header().backing.as_ref().is_some_and(|backing| Path::new(&backing.name) == real))
}
