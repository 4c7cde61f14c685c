//! Where things come from: another repository, however far away.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Read},
    sync::Arc,
    thread,
};

use qvd_core::{FlavourName, Tag};

use super::{
    CommitId, ObjectId, Repository, Signatures, Tree, TreeId,
    wire::{Channel, Remote, answer},
};
use crate::Error;

/// As much as a pipe holds. Source: pipe(7).
const PIPE_BYTES: usize = 64 << 10;

/// Where a repository can get things from: another one, however far away. What
/// it gives is not trusted.
pub trait Source: fmt::Debug + Send + Sync {
    /// Every flavour that it has.
    ///
    /// # Errors
    /// It cannot be reached, or is damaged; so for all of these.
    fn flavours(&self) -> Result<Vec<FlavourName>, Error>;

    /// A flavour's tags and where they are.
    ///
    /// # Errors
    /// As [`Source::flavours`].
    fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error>;

    /// The encoding of a commit.
    ///
    /// # Errors
    /// As [`Source::flavours`]; also if there is no such commit.
    fn commit(&self, id: CommitId) -> Result<Vec<u8>, Error>;

    /// The signatures of those of these commits that have any.
    ///
    /// # Errors
    /// As [`Source::flavours`].
    fn signatures(&self, commits: &[CommitId]) -> Result<Signatures, Error>;

    /// The encoding of a tree. The caller has the tree `like`, if any: a source
    /// may send what differs.
    ///
    /// # Errors
    /// As [`Source::commit`].
    fn tree(&self, id: TreeId, like: Option<&Tree>) -> Result<Vec<u8>, Error>;

    /// Gives each of these contents to `take`, in any order.
    ///
    /// # Errors
    /// As [`Source::commit`], and what `take` fails with.
    fn objects(
        &self,
        ids: &[ObjectId],
        take: &mut dyn FnMut(ObjectId, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), Error>;

    /// Bytes that have come from it so far.
    fn received_bytes(&self) -> u64;
}

/// Another repository in a directory of this host, which may be of another host
/// in truth: what is taken from it is compressed and counted as on any way.
#[derive(Debug)]
pub struct Directory(Remote<Here>);

impl Directory {
    /// Takes from a repository.
    #[must_use]
    pub fn new(repository: Repository) -> Self {
        let name = repository.dir().display().to_string();
        Self(Remote::new(name, Here(Arc::new(repository))))
    }
}

/// Answers come from a thread of this process.
#[derive(Debug)]
struct Here(Arc<Repository>);

impl Channel for Here {
    fn ask(&self, question: &[u8]) -> io::Result<Box<dyn Read + '_>> {
        let (from, to) = io::pipe()?;
        let (repository, question) = (Arc::clone(&self.0), question.to_vec());
        let give = move || {
            let mut to = io::BufWriter::with_capacity(PIPE_BYTES, to);
            if let Err(error) = answer(&repository, &question, &mut to) {
                tracing::debug!(%error, "an answer was cut off");
            }
        };
        thread::Builder::new().name("repository".to_owned()).spawn(give)?;
        Ok(Box::new(from))
    }
}

impl Source for Directory {
    fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        self.0.flavours()
    }

    fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error> {
        self.0.tags(flavour)
    }

    fn commit(&self, id: CommitId) -> Result<Vec<u8>, Error> {
        self.0.commit(id)
    }

    fn signatures(&self, commits: &[CommitId]) -> Result<Signatures, Error> {
        self.0.signatures(commits)
    }

    fn tree(&self, id: TreeId, like: Option<&Tree>) -> Result<Vec<u8>, Error> {
        self.0.tree(id, like)
    }

    fn objects(
        &self,
        ids: &[ObjectId],
        take: &mut dyn FnMut(ObjectId, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), Error> {
        self.0.objects(ids, take)
    }

    fn received_bytes(&self) -> u64 {
        self.0.received_bytes()
    }
}

/// A repository on the same disk, as it is: nothing is compressed, and no byte
/// travels.
impl Source for Repository {
    fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        Self::flavours(self)
    }

    fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error> {
        Self::tags(self, flavour)
    }

    fn commit(&self, id: CommitId) -> Result<Vec<u8>, Error> {
        self.commit_bytes(id)
    }

    fn signatures(&self, commits: &[CommitId]) -> Result<Signatures, Error> {
        let of = |id: &CommitId| Ok((*id, Self::signatures(self, *id)?));
        commits.iter().map(of).collect()
    }

    fn tree(&self, id: TreeId, _like: Option<&Tree>) -> Result<Vec<u8>, Error> {
        let path = self.tree_path(id);
        fs::read(&path).map_err(Error::io("read", &path))
    }

    fn objects(
        &self,
        ids: &[ObjectId],
        take: &mut dyn FnMut(ObjectId, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), Error> {
        ids.iter().try_for_each(|id| take(*id, &mut self.object(*id)?).map_err(Error::io("take from", self.dir())))
    }

    fn received_bytes(&self) -> u64 {
        0
    }
}
