//! Deleting what nothing needs.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{CommitId, Content, ObjectId, Repository, TreeId, ids, lock::Lock, objects};
use crate::{Error, fsio};

/// What is kept besides what tags lead to.
#[derive(Debug, Clone)]
pub struct Keep {
    /// Commits that a tag was on within this time.
    pub reflog: Duration,
    /// Commits that are in use.
    pub commits: Vec<CommitId>,
}

impl Default for Keep {
    /// A month: long enough to notice that a tag was moved by mistake.
    fn default() -> Self {
        Self { reflog: Duration::from_secs(30 * 86_400), commits: Vec::new() }
    }
}

/// What was deleted, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Commits.
    pub commits: u64,
    /// Trees.
    pub trees: u64,
    /// Contents.
    pub objects: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Commits that stay.
    pub kept_commits: u64,
    /// Contents that stay.
    pub kept_objects: u64,
}

#[derive(Default)]
struct Marked {
    commits: HashSet<CommitId>,
    trees: HashSet<TreeId>,
    objects: HashSet<ObjectId>,
}

impl Repository {
    /// Deletes what neither a tag, nor the recent past of one, nor `keep` needs;
    /// with `dry_run` says only what that is. Waits for whoever is adding.
    ///
    /// Commits go before their trees and these before their contents: what is
    /// still there after a crash is complete.
    ///
    /// # Errors
    /// Something that is to be kept is missing or damaged: then nothing is deleted.
    pub fn gc(&self, keep: &Keep, dry_run: bool) -> Result<Collected, Error> {
        let _alone = Lock::alone(&self.lock_path())?;
        let marked = self.mark(keep)?;
        let commits: Vec<PathBuf> = self
            .commits()?
            .into_iter()
            .filter(|id| !marked.commits.contains(id))
            .map(|id| self.commit_path(id))
            .collect();
        // After their commits; those too whose commit went before a crash.
        let lists = ids(&self.dir().join("commits"), |name| CommitId::from_hex(name.strip_suffix(".new")?))?;
        let lists: Vec<PathBuf> =
            lists.into_iter().filter(|id| !marked.commits.contains(id)).map(|id| self.novel_path(id)).collect();
        let trees =
            ids(&self.dir().join("trees"), |name| TreeId::from_hex(name.strip_suffix(".erofs").unwrap_or(name)))?;
        let trees: HashSet<TreeId> = trees.into_iter().filter(|id| !marked.trees.contains(id)).collect();
        let tree_files: Vec<PathBuf> =
            trees.iter().flat_map(|id| [self.tree_path(*id), self.mountable_path(*id)]).collect();
        let all = self.objects.all().map_err(Error::io("read", self.objects.dir()))?;
        let objects: Vec<ObjectId> = all.iter().copied().filter(|id| !marked.objects.contains(id)).collect();
        let mut collected = Collected {
            commits: commits.len() as u64,
            trees: trees.len() as u64,
            objects: objects.len() as u64,
            bytes: 0,
            kept_commits: marked.commits.len() as u64,
            kept_objects: (all.len() - objects.len()) as u64,
        };
        collected.bytes += self.sweep(&commits, &[&self.dir().join("commits")], dry_run)?;
        let signatures = self.signature_files()?.into_iter().filter(|(id, _)| !marked.commits.contains(id));
        let signatures: Vec<PathBuf> = signatures.map(|(_, path)| path).collect();
        collected.bytes += self.sweep(&signatures, &[], dry_run)?;
        collected.bytes += self.sweep(&lists, &[], dry_run)?;
        collected.bytes += self.sweep(&tree_files, &[&self.dir().join("trees")], dry_run)?;
        let paths: Vec<PathBuf> = objects.iter().map(|id| self.objects.dir().join(objects::name(*id))).collect();
        collected.bytes += self.sweep(&paths, &[], dry_run)?;
        Ok(collected)
    }

    fn mark(&self, keep: &Keep) -> Result<Marked, Error> {
        let since = SystemTime::now().checked_sub(keep.reflog).unwrap_or(UNIX_EPOCH);
        let since_unix_s = since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut todo: Vec<CommitId> = keep.commits.iter().copied().filter(|id| self.has_commit(*id)).collect();
        for flavour in self.all_flavours()? {
            todo.extend(self.tags(&flavour)?.into_values());
            for tag in self.tag_names(&flavour)? {
                // Those who do not have the new one yet start from it.
                todo.extend(self.before_rollout(&flavour, &tag)?.filter(|id| self.has_commit(*id)));
            }
            for tag in self.logged_tags(&flavour)? {
                let moves = self.reflog(&flavour, &tag)?;
                let recent = moves.into_iter().filter(|one| one.time_unix_s > since_unix_s);
                // Of the past only what is still there can be kept.
                todo.extend(recent.flat_map(|one| [one.from, one.to]).flatten().filter(|id| self.has_commit(*id)));
            }
        }
        let mut marked = Marked::default();
        while let Some(id) = todo.pop() {
            if !marked.commits.insert(id) {
                continue;
            }
            let commit = self.commit(id)?;
            todo.extend(&commit.parents);
            marked.objects.extend(commit.packages);
            if let Content::Tree { id, .. } = commit.content {
                marked.trees.insert(id);
            }
            // A parent is kept with what it needs: what is new in this commit
            // is all that it adds, and known without a look at its tree.
            marked.objects.extend(self.novel(id, &commit)?);
        }
        Ok(marked)
    }

    /// Deletes files and returns the bytes that this frees; what is not there
    /// is passed over. The directories in `sync` are on disk afterwards.
    fn sweep(&self, files: &[PathBuf], sync: &[&Path], dry_run: bool) -> Result<u64, Error> {
        let mut bytes = 0;
        for path in files {
            let len = match fs::symlink_metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                meta => meta.map_err(Error::io("look at", path))?.len(),
            };
            bytes += len;
            if !dry_run {
                fs::remove_file(path).map_err(Error::io("remove", path))?;
            }
        }
        if !dry_run && bytes > 0 {
            for dir in sync {
                fsio::sync_dir(dir).map_err(Error::io("write", dir))?;
            }
        }
        Ok(bytes)
    }
}
