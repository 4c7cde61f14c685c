//! Looking for what is damaged, and repairing it from another repository.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use serde::{Deserialize, Serialize};

use super::{
    Commit, CommitId, Content, ObjectId, Repository, Source, Tree, TreeId, disk, erofs, ids, lock::Lock,
    transfer::LIST_MAX_BYTES, verity,
};
use crate::{Error, fsio};

/// Most threads that read and hash.
const THREADS_MAX: usize = 4;

/// Something that is not as it has to be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// What it is, with its name: `object sha256:…`, `tag default of icewm`.
    pub what: String,
    /// What is wrong with it.
    pub reason: String,
    /// Whether it is as it has to be again.
    pub repaired: bool,
}

/// What a check found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Checked {
    /// Everything that is wrong, by name.
    pub problems: Vec<Problem>,
    /// Contents that were read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Trees that were read.
    pub trees: u64,
    /// Commits that were read.
    pub commits: u64,
    /// Tags that were looked at.
    pub tags: u64,
}

impl Checked {
    /// Whether nothing is wrong any more.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.iter().all(|problem| problem.repaired)
    }
}

/// What is wrong, before it has words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Object(ObjectId),
    Tree(TreeId),
    Mountable(TreeId),
    Commit(CommitId),
    Novel(CommitId),
}

struct Check<'a> {
    repository: &'a Repository,
    found: Vec<(Part, String)>,
    checked: Checked,
    /// Contents that something needs.
    needed: BTreeSet<ObjectId>,
}

impl Repository {
    /// Reads everything and compares it with its name: finds each flipped bit,
    /// whatever is missing, and tags that lead nowhere. With `from`, what is
    /// wrong is fetched from there, verified, and put in place.
    ///
    /// # Errors
    /// The repository cannot be read at all. What is damaged is no error: it is
    /// in the result.
    pub fn fsck(&self, from: Option<&dyn Source>) -> Result<Checked, Error> {
        let _keep = Lock::shared(&self.lock_path())?;
        let from = from.map(Spare);
        let mut check =
            Check { repository: self, found: Vec::new(), checked: Checked::default(), needed: BTreeSet::new() };
        check.commits(from)?;
        check.trees(from)?;
        check.objects()?;
        check.found.sort();
        check.found.dedup_by_key(|(part, _)| *part);
        for (part, reason) in std::mem::take(&mut check.found) {
            let repaired = match from {
                Some(from) => self.repair(part, from)?,
                // This one is made of what is here.
                None => false,
            };
            let what = match part {
                Part::Object(id) => format!("object {id}"),
                Part::Tree(id) => format!("tree {id}"),
                Part::Mountable(id) => format!("EROFS of tree {id}"),
                Part::Commit(id) => format!("commit {id}"),
                Part::Novel(id) => format!("list of what is new in commit {id}"),
            };
            check.checked.problems.push(Problem { what, reason, repaired });
        }
        check.signatures(from)?;
        check.tags()?;
        Ok(check.checked)
    }

    /// Reads all of one commit and compares it with its id.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::DamagedPart`] with the first thing that is
    /// missing or was changed.
    pub fn verify(&self, id: CommitId) -> Result<(), Error> {
        let commit = self.commit(id)?;
        let mut objects: Vec<ObjectId> = commit.packages.into_iter().collect();
        match commit.content {
            Content::Tree { id, .. } => {
                let tree = self.tree(id)?;
                let found = fs::read(self.mountable_path(id)).unwrap_or_default();
                if found != erofs::image(&tree) {
                    let reason = "it is missing or was changed".to_owned();
                    return Err(Error::DamagedPart { what: format!("EROFS of tree {id}"), reason });
                }
                objects.extend(tree.objects().map(|(object, _)| object));
            }
            Content::Disk { blocks, .. } => {
                objects.push(blocks);
                objects.extend(self.disk_blocks(blocks)?.into_iter().flatten());
            }
        }
        objects.sort_unstable();
        objects.dedup();
        for object in objects {
            let (found, _) = verity::copy(&mut self.object(object)?, |_| Ok(()))
                .map_err(Error::io("read", self.objects.path(object)))?;
            if found != object {
                let reason = "its content was changed".to_owned();
                return Err(Error::DamagedPart { what: format!("object {object}"), reason });
            }
        }
        Ok(())
    }

    /// Puts something in place of what is damaged; says whether there was a
    /// sound one.
    fn repair(&self, part: Part, from: Spare<'_>) -> Result<bool, Error> {
        if let Part::Novel(id) = part {
            // It is made of what has been repaired before.
            self.forget_novel(id)?;
            return Ok(self.commit(id).and_then(|commit| self.novel(id, &commit)).is_ok());
        }
        let staged = tempfile::NamedTempFile::new_in(self.incoming()).map_err(Error::io("write below", self.dir()))?;
        let write = |bytes: &[u8]| io::Write::write_all(&mut staged.as_file(), bytes);
        let (sound, to) = match part {
            Part::Object(id) => (from.object(id, &mut { write }), self.objects.path(id)),
            Part::Tree(id) => {
                let tree = from.tree(id);
                (tree.is_some_and(|tree| write(&tree.encode().1).is_ok()), self.tree_path(id))
            }
            Part::Mountable(id) => {
                let tree = self.tree(id).ok().or_else(|| from.tree(id));
                (tree.is_some_and(|tree| write(&erofs::image(&tree)).is_ok()), self.mountable_path(id))
            }
            Part::Commit(id) => {
                let commit = from.commit(id);
                (commit.is_some_and(|(bytes, _)| write(&bytes).is_ok()), self.commit_path(id))
            }
            Part::Novel(_) => return Ok(false),
        };
        if !sound {
            return Ok(false);
        }
        let put = || {
            use std::os::unix::fs::PermissionsExt;
            staged.as_file().set_permissions(fs::Permissions::from_mode(0o444))?;
            staged.as_file().sync_all()?;
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
                fs::rename(staged.path(), &to)?;
                fsio::sync_dir(parent)?;
            }
            io::Result::Ok(())
        };
        put().map_err(Error::io("repair", &to))?;
        Ok(true)
    }
}

/// Another repository, which sound copies may come from. What it gives is
/// checked; that it has nothing sound is no error.
#[derive(Clone, Copy)]
struct Spare<'a>(&'a dyn Source);

impl Spare<'_> {
    fn commit(self, id: CommitId) -> Option<(Vec<u8>, Commit)> {
        let bytes = self.0.commit(id).ok()?;
        let (found, commit) = Commit::decode(&bytes).ok()?;
        (found == id).then_some((bytes, commit))
    }

    fn tree(self, id: TreeId) -> Option<Tree> {
        let (found, tree) = Tree::decode(&self.0.tree(id, None).ok()?).ok()?;
        (found == id).then_some(tree)
    }

    /// Copies a content; says whether it is that.
    fn object(self, id: ObjectId, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> bool {
        let mut sound = false;
        let given = self.0.objects(&[id], &mut |_, content| {
            sound = verity::copy(content, &mut *write)?.0 == id;
            Ok(())
        });
        given.is_ok() && sound
    }

    fn blocks(self, list: ObjectId) -> Option<Vec<Option<ObjectId>>> {
        let mut bytes = Vec::new();
        let sound = self.object(list, &mut |some| {
            bytes.extend_from_slice(some);
            if bytes.len() as u64 > LIST_MAX_BYTES { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
        });
        sound.then(|| disk::blocks(&bytes))
    }

    fn signatures(self, id: CommitId) -> Result<Vec<String>, Error> {
        Ok(self.0.signatures(&[id])?.remove(&id).unwrap_or_default())
    }
}

impl Check<'_> {
    /// Commits, those included that are missing but a parent or under a tag.
    fn commits(&mut self, from: Option<Spare<'_>>) -> Result<(), Error> {
        let mut todo = self.repository.commits()?;
        for flavour in self.repository.flavours()? {
            for tag in self.repository.tag_names(&flavour)? {
                // One that cannot be read is told of with the tags.
                todo.extend(self.repository.tagged(&flavour, &tag).unwrap_or_default());
            }
        }
        todo.sort_unstable();
        todo.dedup();
        let changed = todo.iter().filter(|id| self.repository.known_novel(**id).is_none());
        self.found.extend(changed.map(|id| (Part::Novel(*id), "it is missing or was changed".to_owned())));
        let mut seen: BTreeSet<CommitId> = todo.iter().copied().collect();
        while let Some(id) = todo.pop() {
            self.checked.commits += 1;
            let commit = match self.repository.commit(id) {
                Ok(commit) => commit,
                Err(error) => {
                    self.found.push((Part::Commit(id), reason(&error)));
                    // What it needs is checked too, if there is a sound one.
                    let Some((_, commit)) = from.and_then(|from| from.commit(id)) else { continue };
                    commit
                }
            };
            todo.extend(commit.parents.iter().filter(|parent| seen.insert(**parent)));
            self.needed.extend(commit.packages);
            match commit.content {
                Content::Tree { id, .. } if !self.repository.tree_path(id).exists() => {
                    self.found.push((Part::Tree(id), "it is missing".to_owned()));
                    if let Some(tree) = from.and_then(|from| from.tree(id)) {
                        self.needed.extend(tree.objects().map(|(object, _)| object));
                        self.found.push((Part::Mountable(id), "it is missing".to_owned()));
                    }
                }
                Content::Tree { .. } => {}
                Content::Disk { blocks, .. } => {
                    self.needed.insert(blocks);
                    let listed = self.repository.disk_blocks(blocks).or_else(|error| match from {
                        Some(from) => from.blocks(blocks).ok_or(error),
                        None => Err(error),
                    });
                    self.needed.extend(listed.into_iter().flatten().flatten());
                }
            }
        }
        Ok(())
    }

    fn trees(&mut self, from: Option<Spare<'_>>) -> Result<(), Error> {
        for id in ids(&self.repository.dir().join("trees"), TreeId::from_hex)? {
            self.checked.trees += 1;
            let tree = match self.repository.tree(id) {
                Ok(tree) => tree,
                Err(error) => {
                    self.found.push((Part::Tree(id), reason(&error)));
                    let Some(tree) = from.and_then(|from| from.tree(id)) else { continue };
                    tree
                }
            };
            self.needed.extend(tree.objects().map(|(object, _)| object));
            match fs::read(self.repository.mountable_path(id)) {
                Ok(found) if found == erofs::image(&tree) => {}
                Ok(_) => self.found.push((Part::Mountable(id), "it was changed".to_owned())),
                Err(error) => self.found.push((Part::Mountable(id), error.to_string())),
            }
        }
        Ok(())
    }

    fn objects(&mut self) -> Result<(), Error> {
        let objects = &self.repository.objects;
        let all = objects.all().map_err(Error::io("read", objects.dir()))?;
        let (next, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
        let bad: Mutex<Vec<(Part, String)>> = Mutex::default();
        let work = || {
            while let Some(id) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let reason = match digest(&objects.path(*id)) {
                    Ok((found, len)) => {
                        bytes.fetch_add(len, Ordering::Relaxed);
                        if found == *id {
                            continue;
                        }
                        "its content was changed".to_owned()
                    }
                    Err(error) => error.to_string(),
                };
                bad.lock().unwrap_or_else(PoisonError::into_inner).push((Part::Object(*id), reason));
            }
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
        self.found.extend(bad.into_inner().unwrap_or_else(PoisonError::into_inner));
        let here: BTreeSet<ObjectId> = all.iter().copied().collect();
        let missing = self.needed.iter().filter(|id| !here.contains(id));
        self.found.extend(missing.map(|id| (Part::Object(*id), "it is missing".to_owned())));
        self.checked.objects = all.len() as u64;
        self.checked.bytes = bytes.into_inner();
        Ok(())
    }

    /// Signatures: one that is wrong is replaced by that of the other repository.
    fn signatures(&mut self, from: Option<Spare<'_>>) -> Result<(), Error> {
        for (id, path, reason) in self.repository.wrong_signatures()? {
            let mut repaired = false;
            for text in from.map_or_else(|| Ok(Vec::new()), |from| from.signatures(id))? {
                if self.repository.place_for_signature(id, &text).as_ref() == Some(&path) {
                    fsio::replace(&path, text.as_bytes()).map_err(Error::io("repair", &path))?;
                    repaired = !self.repository.wrong_signatures()?.iter().any(|(_, wrong, _)| *wrong == path);
                }
            }
            let key = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            self.checked.problems.push(Problem {
                what: format!("signature of commit {id} by {key}"),
                reason,
                repaired,
            });
        }
        Ok(())
    }

    /// Tags, last: a commit that they lead to may have been repaired.
    fn tags(&mut self) -> Result<(), Error> {
        for flavour in self.repository.flavours()? {
            for tag in self.repository.tag_names(&flavour)? {
                self.checked.tags += 1;
                let reason = match self.repository.tagged(&flavour, &tag) {
                    Err(error) => reason(&error),
                    Ok(Some(commit)) if !self.repository.has_commit(commit) => {
                        format!("it is on commit {commit}, which is missing")
                    }
                    Ok(_) => continue,
                };
                let what = format!("tag {tag} of {flavour}");
                self.checked.problems.push(Problem { what, reason, repaired: false });
            }
        }
        Ok(())
    }
}

fn digest(path: &Path) -> io::Result<(ObjectId, u64)> {
    verity::copy(&mut File::open(path)?, |_| Ok(()))
}

/// What is wrong, without the name that stands before it.
fn reason(error: &Error) -> String {
    match error {
        Error::Damaged { reason, .. } | Error::DamagedPart { reason, .. } => reason.clone(),
        Error::NoSuchImage(_) => "it is missing".to_owned(),
        other => qvd_core::causes(other).join(": "),
    }
}
