//! Who uses which commit: roots that stand on one keep it from being collected.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{CommitId, Repository, ids, lock::Lock};
use crate::{Error, RootId, fsio};

/// Directory of leases: a file for each root, with the id of its commit.
const DIR: &str = "in-use";

impl Repository {
    /// Notes that the root `root` stands on a commit, before it does.
    ///
    /// Of a root that does not outlive its desktop nothing is left after a power
    /// cut: only the note of one that is `kept` is synced.
    pub(crate) fn lease(&self, root: &RootId, id: CommitId, kept: bool) -> Result<(), Error> {
        let _keep = Lock::shared(&self.lock_path())?;
        if !self.has_commit(id) {
            return Err(Error::NoSuchImage(id.digest()));
        }
        let path = self.lease_path(root);
        if fs::read_to_string(&path).is_ok_and(|known| known == id.hex()) {
            return Ok(());
        }
        let write = || {
            fsio::ensure_private_dir(&self.leases())?;
            if kept {
                return fsio::replace(&path, id.hex().as_bytes());
            }
            let staged = self.leases().join(format!(".new-{root}"));
            fs::write(&staged, id.hex())?;
            fs::rename(&staged, &path)
        };
        write().map_err(Error::io("write", &path))
    }

    /// The commit that such a note says `root` stands on.
    pub(crate) fn leased(&self, root: &RootId) -> Result<Option<CommitId>, Error> {
        let path = self.lease_path(root);
        match fs::read_to_string(&path) {
            Ok(hex) => Ok(CommitId::from_hex(hex.trim())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    /// Takes such a note back. It is no error if there is none.
    pub(crate) fn release(&self, root: &RootId) -> Result<(), Error> {
        match fs::remove_file(self.lease_path(root)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", self.lease_path(root))(error))
            }
            _ => Ok(()),
        }
    }

    /// The commits that roots of the store `store` stand on: those of containers
    /// below `roots` and those of machines below `disks`, of back ends in a directory
    /// each, in a directory each. Notes of roots that are gone count for nothing.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn in_use(&self, store: &Path) -> Result<Vec<CommitId>, Error> {
        let mut backends = Vec::new();
        for kind in ["roots", "disks"] {
            let dir = store.join(kind);
            match fs::read_dir(&dir).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                entries => backends.append(&mut entries.map_err(Error::io("read", &dir))?),
            }
        }
        let leases = match ids(&self.leases(), |name| name.parse::<RootId>().ok()) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            leases => leases?,
        };
        let mut found = Vec::new();
        for root in leases {
            if !backends.iter().any(|backend| backend.path().join(root.as_str()).exists()) {
                continue;
            }
            found.extend(self.leased(&root)?);
        }
        Ok(found)
    }

    fn leases(&self) -> PathBuf {
        self.dir().join(DIR)
    }

    fn lease_path(&self, root: &RootId) -> PathBuf {
        self.leases().join(root.as_str())
    }
}
