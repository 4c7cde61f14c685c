//! What inputs are read in.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::SystemTime,
};

use qvd_storage::{
    ImageConfig, Repository,
    repository::{CommitId, Entry, Meta, NewCommit, Node, ObjectId, Tree},
};

use crate::store::Server;

/// A repository with one commit, the same each time.
#[derive(Debug)]
pub struct World {
    pub(crate) repository: Repository,
    pub(crate) commit: CommitId,
    /// A content that is there.
    pub(crate) object: ObjectId,
    dir: tempfile::TempDir,
    server: OnceLock<Server>,
}

/// Flavour of the commit.
pub(crate) const FLAVOUR: &str = "tiny";

impl World {
    /// Makes it in a directory of its own, which goes with it.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open(&dir.path().join("repository")).unwrap();
        let (commit, object) = {
            let staging = repository.stage().unwrap();
            let file = |content: &[u8]| {
                let (object, size_bytes) = staging.put_bytes(content).unwrap();
                Node::File { object, size_bytes, link: 0 }
            };
            let (motd, big) = (file(b"welcome\n"), file(&[7; 9000]));
            let Node::File { object: Some(object), .. } = big else { panic!("a content is no content") };
            let entries = [
                ("", Node::Directory),
                ("etc", Node::Directory),
                ("etc/motd", motd),
                ("etc/link", Node::Symlink("motd".into())),
                ("big", big),
            ];
            let meta = Meta { mode: 0o755, ..Meta::default() };
            let entries = entries.map(|(path, node)| Entry { path: path.into(), meta: meta.clone(), node });
            let tree = Tree::new(entries.into()).unwrap();
            let new = NewCommit {
                config: ImageConfig::plain(FLAVOUR.parse().unwrap()),
                author: "ana".to_owned(),
                message: "first".to_owned(),
                time: SystemTime::UNIX_EPOCH,
                recipe: None,
                publish: true,
            };
            (repository.commit_tree(&staging, &tree, new).unwrap(), object)
        };
        Self { repository, commit, object, dir, server: OnceLock::new() }
    }

    /// A path in a directory that is this world's alone.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A server that answers what it is told to.
    pub(crate) fn server(&self) -> &Server {
        self.server.get_or_init(Server::start)
    }

    /// A repository with nothing in it, for one input.
    pub(crate) fn fresh(&self) -> Fresh {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        let repository = Repository::open(dir.path()).unwrap();
        Fresh { repository, _dir: dir }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// A repository that goes when it is dropped.
pub(crate) struct Fresh {
    pub(crate) repository: Repository,
    _dir: tempfile::TempDir,
}

impl Fresh {
    /// Whatever was read, nothing of it may spoil what is kept.
    pub(crate) fn expect_sound(&self) {
        let checked = self.repository.fsck(None).unwrap();
        assert!(checked.is_sound(), "{:?}", checked.problems);
        assert_eq!(entries(&self.repository.dir().join("incoming")), 0);
    }
}

/// How many names a directory has.
pub(crate) fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}
