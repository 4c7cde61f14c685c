//! Where contents are: plain files under their digest.

use std::path::{Path, PathBuf};

use super::ObjectId;

/// The contents of a repository. A content of length zero is never kept.
#[derive(Debug)]
pub(crate) struct Objects {
    dir: PathBuf,
}

impl Objects {
    pub(crate) const fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn path(&self, id: ObjectId) -> PathBuf {
        self.dir.join(name(id))
    }

    pub(crate) fn has(&self, id: ObjectId) -> bool {
        self.path(id).exists()
    }

    /// Every object that there is, in no order.
    pub(crate) fn all(&self) -> std::io::Result<Vec<ObjectId>> {
        let mut found = Vec::new();
        for dir in std::fs::read_dir(&self.dir)? {
            let dir = dir?;
            let Some(first) = dir.file_name().to_str().map(str::to_owned) else { continue };
            for entry in std::fs::read_dir(dir.path())? {
                let rest = entry?.file_name();
                found.extend(rest.to_str().and_then(|rest| ObjectId::from_hex(&format!("{first}{rest}"))));
            }
        }
        Ok(found)
    }
}

/// An object's path below the directory of objects. 256 directories keep each
/// short enough for any file system.
pub(crate) fn name(id: ObjectId) -> String {
    let hex = id.hex();
    let (first, rest) = hex.split_at(2);
    format!("{first}/{rest}")
}
