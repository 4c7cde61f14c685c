//! Commits in order: making the next one, and looking back.

use std::{
    collections::{BTreeMap, BinaryHeap, HashSet},
    time::SystemTime,
};

use qvd_core::{Digest, FlavourName, Tag};
use serde::{Deserialize, Serialize};

use super::{Commit, CommitId, Content, Expect, ObjectId, Repository, Staging, Tree, packages};
use crate::{Error, ImageConfig, UserConfig};

/// What a commit is made of, besides its tree.
#[derive(Debug, Clone)]
pub struct NewCommit {
    /// Flavour, and what desktops of it get unless told otherwise.
    pub config: ImageConfig,
    /// Who makes it.
    pub author: String,
    /// Why.
    pub message: String,
    /// When; a build that can be repeated gives it.
    pub time: SystemTime,
    /// Text of the recipe that built it, and that recipe's key.
    pub recipe: Option<(String, Digest)>,
    /// Whether desktops are to follow it: moves `default` besides `head`.
    pub publish: bool,
}

/// A commit as a log shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Logged {
    /// Its id.
    pub id: CommitId,
    /// Flavour that it is of.
    pub flavour: FlavourName,
    /// What it was made from.
    pub parents: Vec<CommitId>,
    /// Who made it.
    pub author: String,
    /// When, in seconds since 1970.
    pub time_unix_s: u64,
    /// Why.
    pub message: String,
    /// Tags that are on it.
    pub tags: Vec<Tag>,
    /// What it holds.
    pub content: Content,
}

impl Logged {
    fn new(id: CommitId, commit: Commit, tags: Vec<Tag>) -> Self {
        Self {
            id,
            flavour: commit.config.flavour,
            parents: commit.parents,
            author: commit.author,
            time_unix_s: commit.time_unix_s,
            message: commit.message,
            tags,
            content: commit.content,
        }
    }
}

impl Repository {
    /// Commits a tree as the next version of its flavour and moves `head`, and
    /// `default` too if the commit is to be published or is the first.
    ///
    /// # Errors
    /// [`Error::TagMoved`] when somebody else committed meanwhile; both commits
    /// are there then, and only the other is on `head`.
    pub fn commit_tree(&self, staging: &Staging<'_>, tree: &Tree, new: NewCommit) -> Result<CommitId, Error> {
        let id = staging.tree(tree)?;
        let content = Content::Tree { id, entries: tree.entries().len() as u64, size_bytes: tree.size_bytes() };
        staging.settle()?;
        let packages = packages::read(self, tree)?;
        let packages = match &packages {
            Some(list) => staging.put_bytes(&list.encode()).map_err(Error::io("write below", self.dir()))?.0,
            None => None,
        };
        self.commit_content(staging, content, packages, new)
    }

    pub(crate) fn commit_content(
        &self,
        staging: &Staging<'_>,
        content: Content,
        packages: Option<ObjectId>,
        new: NewCommit,
    ) -> Result<CommitId, Error> {
        let flavour = new.config.flavour.clone();
        let head = self.tagged(&flavour, &Tag::head())?;
        let mut commit = Commit::new(content, new.config, new.author.clone(), new.time);
        commit.parents.extend(head);
        commit.message.clone_from(&new.message);
        commit.packages = packages;
        (commit.recipe, commit.recipe_key) = new.recipe.unzip();
        let id = staging.commit(&commit)?;
        let by = (new.author.as_str(), new.message.as_str());
        self.advance(&flavour, head, id, new.publish, by)?;
        Ok(id)
    }

    /// Moves `head` from where it was to the next commit, and `default` too if that
    /// is to be published or is the first.
    pub(crate) fn advance(
        &self,
        flavour: &FlavourName,
        from: Option<CommitId>,
        to: CommitId,
        publish: bool,
        by: (&str, &str),
    ) -> Result<(), Error> {
        self.move_tag(flavour, &Tag::head(), Expect::At(from), Some(to), by)?;
        let default = Tag::default_tag();
        if publish || self.tagged(flavour, &default)?.is_none() {
            self.move_tag(flavour, &default, Expect::Anything, Some(to), by)?;
        }
        Ok(())
    }

    /// What a commit came from, itself first, then by time, newest first; a
    /// commit never comes before one that was made from it.
    ///
    /// # Errors
    /// A commit is missing or damaged.
    pub fn log(&self, from: CommitId) -> Result<Vec<Logged>, Error> {
        let tags = self.tags_by_commit(self.commit(from)?.flavour())?;
        let mut commits: BTreeMap<CommitId, (Commit, usize)> = BTreeMap::new();
        let mut todo = vec![from];
        let mut seen = HashSet::from([from]);
        while let Some(id) = todo.pop() {
            let commit = self.commit(id)?;
            for parent in &commit.parents {
                if seen.insert(*parent) {
                    todo.push(*parent);
                }
            }
            commits.insert(id, (commit, 0));
        }
        let parents: Vec<CommitId> = commits.values().flat_map(|(commit, _)| commit.parents.clone()).collect();
        for parent in parents {
            if let Some((_, children)) = commits.get_mut(&parent) {
                *children += 1;
            }
        }
        let mut ready = BinaryHeap::from([(u64::MAX, from)]);
        let mut log = Vec::with_capacity(commits.len());
        while let Some((_, id)) = ready.pop() {
            let Some((commit, _)) = commits.remove(&id) else { continue };
            for parent in &commit.parents {
                if let Some((of_parent, children)) = commits.get_mut(parent) {
                    *children -= 1;
                    if *children == 0 {
                        ready.push((of_parent.time_unix_s, *parent));
                    }
                }
            }
            log.push(Logged::new(id, commit, tags.get(&id).cloned().unwrap_or_default()));
        }
        Ok(log)
    }

    /// A commit as a log shows it, alone.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn logged(&self, id: CommitId) -> Result<Logged, Error> {
        let commit = self.commit(id)?;
        let tags = self.tags_by_commit(commit.flavour())?.remove(&id).unwrap_or_default();
        Ok(Logged::new(id, commit, tags))
    }

    /// Whether `older` is `newer` or something that `newer` came from.
    ///
    /// # Errors
    /// A commit is missing or damaged.
    pub fn is_ancestor(&self, older: CommitId, newer: CommitId) -> Result<bool, Error> {
        let mut todo = vec![newer];
        let mut seen = HashSet::from([newer]);
        while let Some(id) = todo.pop() {
            if id == older {
                return Ok(true);
            }
            todo.extend(self.commit(id)?.parents.into_iter().filter(|parent| seen.insert(*parent)));
        }
        Ok(false)
    }

    /// The tags of a flavour by the commit that they are on.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn tags_by_commit(&self, flavour: &FlavourName) -> Result<BTreeMap<CommitId, Vec<Tag>>, Error> {
        let mut found: BTreeMap<CommitId, Vec<Tag>> = BTreeMap::new();
        for (tag, commit) in self.tags(flavour)? {
            found.entry(commit).or_default().push(tag);
        }
        Ok(found)
    }

    /// What an imported tree runs with: as the flavour's `head` does, or else
    /// plainly, as the first person in its `/etc/passwd`.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn config_for(&self, flavour: &FlavourName, tree: &Tree) -> Result<ImageConfig, Error> {
        let mut config = self.config_of_head(flavour)?;
        if self.tagged(flavour, &Tag::head())?.is_some() {
            return Ok(config);
        }
        let passwd = packages::content(self, tree, "etc/passwd")?.unwrap_or_default();
        // Source: Debian policy 9.2.2, what ids mean; others give the same to people.
        let person = |line: &str| {
            let mut fields = line.split(':');
            let (name, uid) = (fields.next()?, fields.nth(1)?.parse().ok()?);
            let user = UserConfig { name: name.to_owned(), uid, gid: fields.next()?.parse().ok()? };
            (1000..60000).contains(&uid).then_some(user)
        };
        if let Some(user) = String::from_utf8_lossy(&passwd).lines().find_map(person) {
            config.user = user;
        }
        Ok(config)
    }

    /// What the flavour's `head` runs with; a plain configuration if there is none.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn config_of_head(&self, flavour: &FlavourName) -> Result<ImageConfig, Error> {
        match self.tagged(flavour, &Tag::head())? {
            Some(head) => Ok(self.commit(head)?.config),
            None => Ok(ImageConfig::plain(flavour.clone())),
        }
    }

    /// Makes the content of an earlier commit the next version of its flavour:
    /// what came between stays in the history.
    ///
    /// # Errors
    /// As [`Repository::commit_tree`].
    pub fn revert(&self, to: CommitId, author: &str, message: &str) -> Result<CommitId, Error> {
        let old = self.commit(to)?;
        let staging = self.stage()?;
        let new = NewCommit {
            config: old.config,
            author: author.to_owned(),
            message: message.to_owned(),
            time: SystemTime::now(),
            recipe: old.recipe.zip(old.recipe_key),
            publish: false,
        };
        self.commit_content(&staging, old.content, old.packages, new)
    }
}
