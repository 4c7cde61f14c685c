//! What differs between two commits: files and packages.

use std::{
    cmp::Ordering,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, Serializer};

use super::{Commit, Content, Entry, Node, Packages, Repository, Tree, tree::path_order};
use crate::Error;

/// How a file differs. What differs in several ways has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Change {
    /// It is in the second alone.
    Added,
    /// It is in the first alone.
    Removed,
    /// Its content, its kind, or where it leads.
    Changed,
    /// Its permissions.
    Mode,
    /// Its owner or group.
    Owner,
    /// Its extended attributes, access lists and capabilities among them.
    Xattr,
}

/// A file that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDiff {
    /// Where it is, from the root. Written down, what is no UTF-8 in it is replaced.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// In which ways it differs.
    pub changes: Vec<Change>,
}

/// A package that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageDiff {
    /// Name and architecture.
    pub name: String,
    /// Version in the first; none if it was installed.
    pub from: Option<String>,
    /// Version in the second; none if it was removed.
    pub to: Option<String>,
}

/// How two disks differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDiff {
    /// Blocks with another content, or that only one of them has.
    pub changed: u64,
    /// Blocks that either of them has.
    pub total: u64,
    /// Length of a block in bytes.
    pub block_bytes: u32,
}

/// JSON holds text, and names of files are bytes: better an odd sign than no answer.
pub(crate) fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// What differs between two commits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// Of disks, their blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockDiff>,
    /// Files, by path.
    pub files: Vec<FileDiff>,
    /// Packages, by name.
    pub packages: Vec<PackageDiff>,
}

impl Repository {
    /// What differs from `a` to `b`. Contents are compared by digest: nothing
    /// but the two lists is read.
    ///
    /// # Errors
    /// One of them is damaged, or one is a tree and the other a disk.
    pub fn diff(&self, a: &Commit, b: &Commit) -> Result<Diff, Error> {
        if let (Content::Disk { blocks: one, block_bytes, .. }, Content::Disk { blocks: other, block_bytes: same, .. }) =
            (a.content, b.content)
            && block_bytes == same
        {
            let (one, other) = (self.disk_blocks(one)?, self.disk_blocks(other)?);
            let total = one.len().max(other.len());
            let changed = (0..total).filter(|at| one.get(*at) != other.get(*at)).count();
            let blocks = BlockDiff { changed: changed as u64, total: total as u64, block_bytes };
            return Ok(Diff { blocks: Some(blocks), ..Diff::default() });
        }
        let files = match a.content == b.content {
            true => Vec::new(),
            false => files(&self.tree_of(a)?, &self.tree_of(b)?),
        };
        let packages = match a.packages == b.packages {
            true => Vec::new(),
            false => packages(self.packages(a)?.as_ref(), self.packages(b)?.as_ref()),
        };
        Ok(Diff { blocks: None, files, packages })
    }
}

/// The files that differ from `a` to `b`.
#[must_use]
pub fn files(a: &Tree, b: &Tree) -> Vec<FileDiff> {
    let mut found = Vec::new();
    let (mut left, mut right) = (a.entries().iter().peekable(), b.entries().iter().peekable());
    loop {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return found,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => path_order(&a.path, &b.path),
        };
        let mut add = |entry: &Entry, changes| {
            found.push(FileDiff { path: PathBuf::from("/").join(&entry.path), changes });
        };
        match order {
            Ordering::Less => left.next().into_iter().for_each(|a| add(a, vec![Change::Removed])),
            Ordering::Greater => right.next().into_iter().for_each(|b| add(b, vec![Change::Added])),
            Ordering::Equal => {
                if let (Some(a), Some(b)) = (left.next(), right.next()) {
                    let changes = changes(a, b);
                    if !changes.is_empty() {
                        add(b, changes);
                    }
                }
            }
        }
    }
}

fn changes(a: &Entry, b: &Entry) -> Vec<Change> {
    let same_content = match (&a.node, &b.node) {
        // The number of a group of names says nothing by itself.
        (Node::File { object: one, .. }, Node::File { object: other, .. }) => one == other,
        (one, other) => one == other,
    };
    [
        (Change::Changed, same_content),
        (Change::Mode, a.meta.mode == b.meta.mode),
        (Change::Owner, (a.meta.uid, a.meta.gid) == (b.meta.uid, b.meta.gid)),
        (Change::Xattr, a.meta.xattrs == b.meta.xattrs),
    ]
    .into_iter()
    .filter_map(|(change, same)| (!same).then_some(change))
    .collect()
}

/// The packages that differ from `a` to `b`.
#[must_use]
pub fn packages(a: Option<&Packages>, b: Option<&Packages>) -> Vec<PackageDiff> {
    let version = |packages: Option<&Packages>, name: &str| packages?.versions.get(name).cloned();
    let mut names: Vec<&String> = [a, b].into_iter().flatten().flat_map(|packages| packages.versions.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let all =
        names.into_iter().map(|name| PackageDiff { name: name.clone(), from: version(a, name), to: version(b, name) });
    all.filter(|package| package.from != package.to).collect()
}
