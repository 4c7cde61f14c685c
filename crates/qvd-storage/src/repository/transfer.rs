//! From one repository to another: only what is missing, verified on arrival,
//! visible when it is whole.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Read},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use qvd_core::{FlavourName, Tag};
use serde::{Deserialize, Serialize};

use super::{
    Commit, CommitId, Content, Expect, ObjectId, Repository, Source, Staging, Tree, TreeId, signing::SIGNATURES_MAX,
};
use crate::{Error, fsio};

/// Most batches that travel at once.
const AT_ONCE: usize = 4;
/// A batch ends with the object that fills one of these.
const BATCH_BYTES: u64 = 16 << 20;
const BATCH_OBJECTS: usize = 512;
/// After so many bytes what arrived gets its name: a cut later costs no more.
const SETTLE_BYTES: u64 = 128 << 20;
/// Largest content of which no tree says how long it is: a list.
pub(crate) const LIST_MAX_BYTES: u64 = 256 << 20;

/// How far a transfer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    /// Commits that arrived.
    pub commits: u64,
    /// Trees that arrived.
    pub trees: u64,
    /// Contents that arrived.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Contents that have to arrive, as far as is known yet.
    pub objects_total: u64,
    /// Their bytes.
    pub bytes_total: u64,
    /// Bytes that travelled for all of it.
    pub wire_bytes: u64,
}

/// What is to be transferred.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Flavour.
    pub flavour: FlavourName,
    /// Its tag; none means every tag.
    pub tag: Option<Tag>,
    /// Lets `head` go where it does not come from.
    pub force: bool,
}

/// How far a transfer is, and who is told.
type Told<'a> = (Transferred, &'a mut (dyn FnMut(&Transferred) + Send));

struct Job<'a, 'r> {
    source: &'a dyn Source,
    staging: &'a Staging<'r>,
    told: Mutex<Told<'a>>,
}

impl Repository {
    /// Gets tags, and everything they lead to that is not here, from another
    /// repository. What arrived before a cut is not fetched again. Tags move
    /// last, once all of it is on disk.
    ///
    /// # Errors
    /// The source cannot be reached, lies, or has a `head` that ours did not
    /// lead to; then tags are where they were.
    pub fn pull(
        &self,
        source: &dyn Source,
        wanted: &Wanted,
        who: &str,
        progress: &mut (dyn FnMut(&Transferred) + Send),
    ) -> Result<Transferred, Error> {
        let flavour = &wanted.flavour;
        let mut tags = source.tags(flavour)?;
        if tags.is_empty() {
            return Err(Error::NoSuchFlavour(flavour.clone()));
        }
        if let Some(tag) = &wanted.tag {
            let known = tags.keys().map(|tag| format!("`{tag}`")).collect();
            tags.retain(|name, _| name == tag);
            if tags.is_empty() {
                return Err(Error::NoSuchTag { flavour: flavour.clone(), tag: tag.clone(), known });
            }
        }
        let staging = self.stage()?;
        let before = source.received_bytes();
        let job = Job { source, staging: &staging, told: Mutex::new((Transferred::default(), progress)) };
        let missing = job.missing(tags.values().copied().collect(), flavour)?;
        // Those of what is here already too: it may have been signed since.
        job.signatures(missing.iter().map(|(id, _)| *id).chain(tags.values().copied()).collect())?;
        for commit in missing {
            job.commit(commit)?;
        }
        let mut done = job.told.into_inner().unwrap_or_else(PoisonError::into_inner).0;
        for (tag, to) in &tags {
            let here = self.tagged(flavour, tag)?;
            if let Some(here) = here
                && *tag == Tag::head()
                && !wanted.force
                && !self.is_ancestor(here, *to)?
            {
                return Err(Error::Refused(format!(
                    "`head` of {flavour} is on {here}, which {to} was not made from; force it to leave that"
                )));
            }
            self.move_tag(flavour, tag, Expect::At(here), Some(*to), (who, "transferred"))?;
        }
        done.wire_bytes = source.received_bytes() - before;
        Ok(done)
    }
}

impl Job<'_, '_> {
    /// Commits that are not here, each after what it was made from.
    fn missing(&self, tips: Vec<CommitId>, flavour: &FlavourName) -> Result<Vec<(CommitId, Vec<u8>)>, Error> {
        let here = self.staging.repository();
        let mut found: Vec<(CommitId, Vec<u8>)> = Vec::new();
        let mut seen = HashSet::new();
        // Whether a commit's parents are done: it is added after them.
        let mut todo: Vec<(CommitId, Option<Vec<u8>>)> = tips.into_iter().map(|id| (id, None)).collect();
        while let Some((id, fetched)) = todo.pop() {
            if let Some(bytes) = fetched {
                found.push((id, bytes));
                continue;
            }
            if here.has_commit(id) || !seen.insert(id) {
                continue;
            }
            let bytes = self.source.commit(id)?;
            let lie = |reason: String| Error::Damaged { digest: id.digest(), reason };
            let (real, commit) = Commit::decode(&bytes).map_err(lie)?;
            if real != id {
                return Err(lie("what was received for it is another commit".to_owned()));
            }
            if commit.flavour() != flavour {
                return Err(lie(format!("it is of flavour {}, not of {flavour}", commit.flavour())));
            }
            todo.push((id, Some(bytes)));
            todo.extend(commit.parents.into_iter().map(|parent| (parent, None)));
        }
        Ok(found)
    }

    /// Gets signatures, which are on disk before their commits.
    fn signatures(&self, mut commits: Vec<CommitId>) -> Result<(), Error> {
        let here = self.staging.repository();
        commits.sort_unstable();
        commits.dedup();
        let mut found = self.source.signatures(&commits)?;
        found.retain(|id, texts| commits.binary_search(id).is_ok() && !texts.is_empty());
        if found.is_empty() {
            return Ok(());
        }
        fsio::ensure_private_dir(&here.signatures_dir()).map_err(Error::io("use", here.signatures_dir()))?;
        for (id, texts) in found {
            for text in texts.iter().take(SIGNATURES_MAX) {
                if let Some(place) = here.place_for_signature(id, text) {
                    self.staging.add(place, text.as_bytes()).map_err(Error::io("write below", here.dir()))?;
                }
            }
        }
        self.staging.settle()
    }

    fn commit(&self, (id, bytes): (CommitId, Vec<u8>)) -> Result<(), Error> {
        let here = self.staging.repository();
        let (_, commit) = Commit::decode(&bytes).map_err(|reason| Error::Damaged { digest: id.digest(), reason })?;
        let mut objects: Vec<(ObjectId, u64)> = commit.packages.map(|object| (object, 0)).into_iter().collect();
        match commit.content {
            Content::Tree { id: tree_id, .. } if !here.has_tree(tree_id) => {
                let tree = self.tree(tree_id, &commit)?;
                objects.extend(tree.objects());
                self.fetch(objects)?;
                self.staging.tree(&tree)?;
                self.tell(|told| told.trees += 1);
            }
            Content::Tree { .. } => self.fetch(objects)?,
            Content::Disk { blocks, block_bytes, .. } => {
                objects.push((blocks, 0));
                self.fetch(objects)?;
                self.staging.settle()?;
                let listed = here.disk_blocks(blocks)?.into_iter().flatten();
                self.fetch(listed.map(|block| (block, block_bytes.into())).collect())?;
            }
        }
        self.staging.settle()?;
        here.expect_content(&commit).map_err(|reason| Error::Damaged { digest: id.digest(), reason })?;
        self.staging.add_commit(id, &commit, &bytes)?;
        self.staging.settle()?;
        self.tell(|told| told.commits += 1);
        Ok(())
    }

    fn tree(&self, id: TreeId, commit: &Commit) -> Result<Tree, Error> {
        let here = self.staging.repository();
        // The tree of the parent is what it most likely resembles.
        let parent = commit.parents.first().and_then(|parent| here.commit(*parent).ok());
        let like = parent.and_then(|parent| here.tree_of(&parent).ok());
        let bytes = self.source.tree(id, like.as_ref())?;
        let lie = |reason: String| Error::DamagedPart { what: format!("tree {id}"), reason };
        if Tree::id_of(&bytes) != id {
            return Err(lie("what was received for it is something else".to_owned()));
        }
        Ok(Tree::decode(&bytes).map_err(|error| lie(error.to_string()))?.1)
    }

    /// Gets contents that are not here, several batches at once.
    fn fetch(&self, mut objects: Vec<(ObjectId, u64)>) -> Result<(), Error> {
        // In the order of the tree: neighbours resemble each other.
        let mut seen = HashSet::new();
        objects.retain(|(id, _)| seen.insert(*id) && !self.staging.has(*id));
        let mut batches: Vec<Vec<(ObjectId, u64)>> = Vec::new();
        let mut filled = BATCH_BYTES;
        for (id, bytes) in &objects {
            match batches.last_mut() {
                Some(batch) if filled < BATCH_BYTES && batch.len() < BATCH_OBJECTS => batch.push((*id, *bytes)),
                _ => {
                    batches.push(vec![(*id, *bytes)]);
                    filled = 0;
                }
            }
            filled += bytes;
        }
        self.tell(|told| {
            told.objects_total += objects.len() as u64;
            told.bytes_total += objects.iter().map(|(_, bytes)| bytes).sum::<u64>();
        });
        let (next, settled) = (AtomicUsize::new(0), AtomicU64::new(0));
        let failure = Mutex::new(None);
        let work = || {
            while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.batch(batch, &settled) {
                    // The others end with the batch they are at.
                    next.store(batches.len(), Ordering::Relaxed);
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
        };
        thread::scope(|scope| (0..AT_ONCE.min(batches.len())).for_each(|_| drop(scope.spawn(work))));
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => {
                // What arrived is sound and need not be fetched again.
                self.staging.settle()?;
                Err(error)
            }
            None => Ok(()),
        }
    }

    fn batch(&self, batch: &[(ObjectId, u64)], settled: &AtomicU64) -> Result<(), Error> {
        let mut asked: HashMap<ObjectId, u64> = batch.iter().copied().collect();
        let ids: Vec<ObjectId> = batch.iter().map(|(id, _)| *id).collect();
        self.source.objects(&ids, &mut |id, content| {
            // No more than there should be is written, whatever is sent.
            let expected = asked.remove(&id).map(|len| if len == 0 { LIST_MAX_BYTES } else { len });
            let (found, len) = self.staging.put(&mut content.take(expected.unwrap_or(0)))?;
            if found != Some(id) {
                let reason = format!("what was received for object {id} is something else");
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            self.tell(|told| {
                told.objects += 1;
                told.bytes += len;
            });
            if settled.fetch_add(len, Ordering::Relaxed) + len > SETTLE_BYTES {
                settled.store(0, Ordering::Relaxed);
                self.staging.settle().map_err(io::Error::other)?;
            }
            Ok(())
        })?;
        match asked.keys().next() {
            Some(id) => {
                let reason = "the source did not send it".to_owned();
                Err(Error::DamagedPart { what: format!("object {id}"), reason })
            }
            None => Ok(()),
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Transferred)) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (so_far, progress) = &mut *told;
        change(so_far);
        so_far.wire_bytes = self.source.received_bytes();
        progress(so_far);
    }
}
