//! What a commit needs that its parent does not: what makes garbage collection
//! cost as much as what was committed since the last, however long the history is.
//!
//! The lists are kept beside the commits. One that is missing or changed is made
//! again when it is needed.

use std::{collections::HashSet, fs, io, path::PathBuf};

use qvd_core::Digest;
use sha2::{Digest as _, Sha256};

use super::{Commit, CommitId, Content, ObjectId, Repository};
use crate::{Error, fsio};

const ID_BYTES: usize = 32;

impl Repository {
    /// Contents that a commit needs and its first parent does not; of one
    /// without a parent all. The caller holds the lock alone.
    pub(crate) fn novel(&self, id: CommitId, commit: &Commit) -> Result<Vec<ObjectId>, Error> {
        if let Some(known) = self.known_novel(id) {
            return Ok(known);
        }
        let novel = self.find_novel(commit)?;
        let path = self.novel_path(id);
        fsio::replace(&path, &encode(id, &novel)).map_err(Error::io("write", &path))?;
        Ok(novel)
    }

    /// The list of a commit that is about to be added, as it is kept.
    pub(crate) fn encode_novel(&self, id: CommitId, commit: &Commit) -> Result<Vec<u8>, Error> {
        Ok(encode(id, &self.find_novel(commit)?))
    }

    fn find_novel(&self, commit: &Commit) -> Result<Vec<ObjectId>, Error> {
        let mut novel = self.contents(commit)?;
        if let Some(parent) = commit.parents.first() {
            for object in self.contents(&self.commit(*parent)?)? {
                novel.remove(&object);
            }
        }
        let mut novel: Vec<ObjectId> = novel.into_iter().collect();
        novel.sort_unstable();
        Ok(novel)
    }

    pub(crate) fn forget_novel(&self, id: CommitId) -> Result<(), Error> {
        let path = self.novel_path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    pub(crate) fn novel_path(&self, id: CommitId) -> PathBuf {
        self.dir().join("commits").join(format!("{}.new", id.hex()))
    }

    /// The list of a commit as it is kept; none if it is not as it was written.
    pub(crate) fn known_novel(&self, id: CommitId) -> Option<Vec<ObjectId>> {
        let bytes = fs::read(self.novel_path(id)).ok()?;
        let (sum, body) = bytes.split_at_checked(ID_BYTES)?;
        if sum != seal(id, body) || body.len() % ID_BYTES != 0 {
            return None;
        }
        let ids = body.chunks_exact(ID_BYTES).filter_map(|id| <[u8; ID_BYTES]>::try_from(id).ok());
        Some(ids.map(|id| ObjectId::new(Digest::new(id))).collect())
    }

    fn contents(&self, commit: &Commit) -> Result<HashSet<ObjectId>, Error> {
        Ok(match commit.content {
            Content::Tree { id, .. } => self.tree(id)?.objects().map(|(object, _)| object).collect(),
            Content::Disk { blocks, .. } => self.disk_blocks(blocks)?.into_iter().flatten().chain([blocks]).collect(),
        })
    }
}

fn encode(id: CommitId, novel: &[ObjectId]) -> Vec<u8> {
    let body: Vec<u8> = novel.iter().flat_map(|object| *object.digest().bytes()).collect();
    [seal(id, &body).as_slice(), &body].concat()
}

/// What tells a list that was changed from one that was not.
fn seal(id: CommitId, body: &[u8]) -> [u8; ID_BYTES] {
    Sha256::new().chain_update("qvd-novel-1\0").chain_update(id.digest().bytes()).chain_update(body).finalize().into()
}
