//! Where a back end keeps its things, and what it shares with its neighbours.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{Error, fsio, trash::Trash};

/// A private directory of one back end, and the trash of the store around it.
#[derive(Debug, Clone)]
pub struct Place {
    dir: PathBuf,
    trash: Arc<Trash>,
}

impl Place {
    /// The directory `dir`, made when it is absent, with a trash beside it:
    /// for a back end that is used without a [`Store`](crate::Store). What was
    /// being made there when a process was killed is thrown away.
    ///
    /// # Errors
    /// The directories cannot be made or read.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_for(dir, "roots")
    }

    /// As [`Place::open`], for a back end that makes disks.
    ///
    /// # Errors
    /// As [`Place::open`].
    pub fn for_disks(dir: &Path) -> Result<Self, Error> {
        Self::open_for(dir, "disks")
    }

    fn open_for(dir: &Path, what: &str) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(Error::io("make", dir))?;
        let trash = Arc::new(Trash::open(&dir.join("trash"))?);
        trash.take_temporary(&dir.join(what))?;
        Self::below(&dir.join(what), trash)
    }

    pub(crate) fn below(dir: &Path, trash: Arc<Trash>) -> Result<Self, Error> {
        fsio::ensure_private_dir(dir).map_err(Error::io("use", dir))?;
        Ok(Self { dir: dir.to_path_buf(), trash })
    }

    /// Where the back end keeps its things.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes what is at `path` out of the way; `Ok` when nothing is there. It
    /// returns after a rename, so `path` has to be on the file system of the
    /// place; deleting goes on in the background and is finished after a crash.
    ///
    /// # Errors
    /// It cannot be renamed.
    pub fn discard(&self, path: &Path) -> Result<(), Error> {
        self.trash.discard(path)
    }

    /// Deletes what was discarded so far, in this thread, and returns when it is
    /// gone: for those who want the space back before they go on.
    ///
    /// # Errors
    /// Something cannot be deleted.
    pub fn finish_discarding(&self) -> Result<(), Error> {
        self.trash.empty()
    }

    pub(crate) fn trash(&self) -> &Trash {
        &self.trash
    }
}
