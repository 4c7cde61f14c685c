//! To a place that keeps things and cannot ask for them: only what is missing
//! there travels, and tags move when all of it is there.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use qvd_core::Tag;

use super::{Commit, CommitId, Content, Expect, Move, ObjectId, Repository, Source, Transferred, TreeId, Wanted};
use crate::Error;

/// Where a repository can bring things to that does not ask for them: a store
/// of named objects. Each thing that is put shows whole or not at all. Calls
/// may come from several threads.
pub trait Destination: Source {
    /// Whether a commit is there, and so all that it holds.
    ///
    /// # Errors
    /// The place cannot be reached; so for all of these.
    fn has_commit(&self, id: CommitId) -> Result<bool, Error>;

    /// Those of these contents that are not there.
    ///
    /// # Errors
    /// As [`Destination::has_commit`].
    fn missing(&self, ids: &[ObjectId]) -> Result<HashSet<ObjectId>, Error>;

    /// Brings a content.
    ///
    /// # Errors
    /// As [`Destination::has_commit`]; also if the content cannot be read.
    fn put_object(&self, id: ObjectId, content: File) -> Result<(), Error>;

    /// Brings the encoding of a tree, unless it is there.
    ///
    /// # Errors
    /// As [`Destination::has_commit`].
    fn put_tree(&self, id: TreeId, bytes: &[u8]) -> Result<(), Error>;

    /// Brings the encoding of a commit, after all that it holds.
    ///
    /// # Errors
    /// As [`Destination::has_commit`].
    fn put_commit(&self, id: CommitId, bytes: &[u8]) -> Result<(), Error>;

    /// Adds signatures to those that a commit has there.
    ///
    /// # Errors
    /// As [`Destination::has_commit`].
    fn put_signatures(&self, id: CommitId, texts: &[String]) -> Result<(), Error>;

    /// Moves a tag from where it is expected to be.
    ///
    /// # Errors
    /// As [`Destination::has_commit`]; [`Error::TagMoved`] if it is elsewhere.
    fn move_tag(&self, wanted: &Wanted, tag: &Tag, expect: Expect, to: &Move) -> Result<(), Error>;

    /// Bytes that were sent to it so far.
    fn sent_bytes(&self) -> u64;

    /// How many contents are brought at once.
    fn at_once(&self) -> usize {
        16
    }
}

/// How far it is, and who is told.
type Told<'a> = (Transferred, &'a mut (dyn FnMut(&Transferred) + Send));

struct Job<'a> {
    from: &'a Repository,
    to: &'a dyn Destination,
    told: Mutex<Told<'a>>,
}

impl Repository {
    /// Brings tags, and everything they lead to that is not there, to a place
    /// that cannot ask for it. What was brought before a cut is not brought
    /// again. Tags move last.
    ///
    /// # Errors
    /// The place cannot be reached, or has a `head` that ours does not come
    /// from, or something here is damaged; then tags there are where they were.
    pub fn push(
        &self,
        to: &dyn Destination,
        wanted: &Wanted,
        who: &str,
        progress: &mut (dyn FnMut(&Transferred) + Send),
    ) -> Result<Transferred, Error> {
        let flavour = &wanted.flavour;
        let all = self.tags(flavour)?;
        if all.is_empty() {
            return Err(Error::NoSuchFlavour(flavour.clone()));
        }
        let mut tags = all.clone();
        if let Some(tag) = &wanted.tag {
            tags.retain(|name, _| name == tag);
            if tags.is_empty() {
                let known = all.keys().map(|tag| format!("`{tag}`")).collect();
                return Err(Error::NoSuchTag { flavour: flavour.clone(), tag: tag.clone(), known });
            }
        }
        let there = to.tags(flavour)?;
        self.expect_forward(wanted, &tags, &there)?;
        // Garbage collection waits until it is all there.
        let _keep = super::lock::Lock::shared(&self.lock_path())?;
        let before = to.sent_bytes();
        let job = Job { from: self, to, told: Mutex::new((Transferred::default(), progress)) };
        let missing = job.missing(tags.values().copied().collect())?;
        for id in missing {
            job.commit(id)?;
        }
        // Of what was there already too: it may have been signed since.
        for id in tags.values() {
            job.signatures(*id)?;
        }
        let time_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for (tag, id) in &tags {
            let from = there.get(tag).copied();
            let step = Move { from, to: Some(*id), time_unix_s, who: who.to_owned(), why: "transferred".to_owned() };
            if from != step.to {
                to.move_tag(wanted, tag, Expect::At(from), &step)?;
            }
        }
        let mut done = job.told.into_inner().unwrap_or_else(PoisonError::into_inner).0;
        done.wire_bytes = to.sent_bytes() - before;
        Ok(done)
    }

    /// Refuses to take `head` of the other side from where ours does not come from.
    fn expect_forward(
        &self,
        wanted: &Wanted,
        tags: &BTreeMap<Tag, CommitId>,
        there: &BTreeMap<Tag, CommitId>,
    ) -> Result<(), Error> {
        let head = Tag::head();
        if let (Some(ours), Some(theirs)) = (tags.get(&head), there.get(&head))
            && !wanted.force
            && !(self.has_commit(*theirs) && self.is_ancestor(*theirs, *ours)?)
        {
            let flavour = &wanted.flavour;
            return Err(Error::Refused(format!(
                "`head` of {flavour} is on {theirs} there, which {ours} was not made from; pull first, or force it to \
                 leave that"
            )));
        }
        Ok(())
    }
}

impl Job<'_> {
    /// Commits that are not there, each after what it was made from.
    fn missing(&self, tips: Vec<CommitId>) -> Result<Vec<CommitId>, Error> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        // Whether a commit's parents are done.
        let mut todo: Vec<(CommitId, bool)> = tips.into_iter().map(|id| (id, false)).collect();
        while let Some((id, parents_done)) = todo.pop() {
            if parents_done {
                found.push(id);
            } else if seen.insert(id) && !self.to.has_commit(id)? {
                todo.push((id, true));
                todo.extend(self.from.commit(id)?.parents.into_iter().map(|parent| (parent, false)));
            }
        }
        Ok(found)
    }

    fn commit(&self, id: CommitId) -> Result<(), Error> {
        let commit = self.from.commit(id)?;
        self.objects(self.contents(id, &commit)?)?;
        if let Content::Tree { id, .. } = commit.content {
            self.to.put_tree(id, &Source::tree(self.from, id, None)?)?;
            self.tell(|told| told.trees += 1);
        }
        // Before their commit, so that none is there without them.
        self.signatures(id)?;
        self.to.put_commit(id, &self.from.commit_bytes(id)?)?;
        self.tell(|told| told.commits += 1);
        Ok(())
    }

    fn signatures(&self, id: CommitId) -> Result<(), Error> {
        let texts = self.from.signatures(id)?;
        if texts.is_empty() { Ok(()) } else { self.to.put_signatures(id, &texts) }
    }

    /// Contents that a commit needs and its first parent, which is there, does
    /// not, with their lengths.
    fn contents(&self, id: CommitId, commit: &Commit) -> Result<Vec<(ObjectId, u64)>, Error> {
        let mut lengths: HashMap<ObjectId, u64> = match commit.content {
            Content::Tree { .. } => self.from.tree_of(commit)?.objects().collect(),
            Content::Disk { blocks, block_bytes, .. } => {
                let listed = self.from.disk_blocks(blocks)?.into_iter().flatten();
                listed.map(|block| (block, block_bytes.into())).collect()
            }
        };
        if let Some(novel) = self.from.known_novel(id) {
            let novel: HashSet<ObjectId> = novel.into_iter().collect();
            lengths.retain(|object, _| novel.contains(object));
        }
        let lists = match commit.content {
            Content::Disk { blocks, .. } => Some(blocks),
            Content::Tree { .. } => None,
        };
        lengths.extend(lists.into_iter().chain(commit.packages).map(|list| (list, 0)));
        // The largest first: at the end nobody waits for a long one alone.
        let mut contents: Vec<(ObjectId, u64)> = lengths.into_iter().collect();
        contents.sort_unstable_by_key(|(object, len)| (std::cmp::Reverse(*len), *object));
        Ok(contents)
    }

    /// Brings those of these contents that are not there, many at once.
    fn objects(&self, mut contents: Vec<(ObjectId, u64)>) -> Result<(), Error> {
        let missing = self.to.missing(&contents.iter().map(|(id, _)| *id).collect::<Vec<_>>())?;
        contents.retain(|(id, _)| missing.contains(id));
        self.tell(|told| {
            told.objects_total += contents.len() as u64;
            told.bytes_total += contents.iter().map(|(_, len)| len).sum::<u64>();
        });
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let work = || {
            while let Some((id, len)) = contents.get(next.fetch_add(1, Ordering::Relaxed)) {
                let put = self.from.object(*id).and_then(|content| self.to.put_object(*id, content));
                match put {
                    Ok(()) => self.tell(|told| {
                        told.objects += 1;
                        told.bytes += len;
                    }),
                    Err(error) => {
                        // The others end with the one they are at.
                        next.store(contents.len(), Ordering::Relaxed);
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            }
        };
        let threads = self.to.at_once().min(contents.len());
        thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn tell(&self, change: impl FnOnce(&mut Transferred)) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (so_far, progress) = &mut *told;
        change(so_far);
        so_far.wire_bytes = self.to.sent_bytes();
        progress(so_far);
    }
}
