//! Images on this host: commits of its repository that roots stand on.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use qvd_core::{Digest, FlavourName, Tag};

use crate::{
    BaseTree, Error, ImageConfig, Recipe, fsio,
    repository::{Commit, CommitId, Content, Expect, NewCommit, Repository},
    trash::Trash,
};

const TEMPORARY: &str = "tmp-";

/// A commit that is here: an immutable tree with its configuration.
#[derive(Debug, Clone)]
pub struct Image {
    id: CommitId,
    commit: Commit,
    base: BaseTree,
    repository: Arc<Repository>,
}

impl Image {
    /// What it is known by: the digest of its commit.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.id.digest()
    }

    /// All that is known of where it came from.
    #[must_use]
    pub const fn commit(&self) -> &Commit {
        &self.commit
    }

    /// What its recipe says about running it.
    #[must_use]
    pub const fn config(&self) -> &ImageConfig {
        &self.commit.config
    }

    /// Files, directories, links and nodes in it.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.commit.content.size().0
    }

    /// Bytes of all its regular files.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.commit.content.size().1
    }

    /// When it was built.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        self.commit.time()
    }

    /// Key of the recipe that it was built by; none if it was imported.
    #[must_use]
    pub const fn recipe_key(&self) -> Option<Digest> {
        self.commit.recipe_key
    }

    /// Its tree as the base of roots.
    #[must_use]
    pub fn base(&self) -> BaseTree {
        self.base.clone()
    }

    /// Reads every file and compares with the digest.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::DamagedPart`] when something was changed.
    pub fn verify(&self) -> Result<(), Error> {
        self.repository.verify(self.id)
    }
}

/// Who made an image, and why.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made<'a> {
    pub(crate) author: &'a str,
    pub(crate) message: &'a str,
    /// What it was built by.
    pub(crate) recipe: Option<&'a Recipe>,
}

/// The images of this host.
#[derive(Debug)]
pub(crate) struct Images {
    repository: Arc<Repository>,
    /// Where trees are made before they are committed.
    making: PathBuf,
    trash: Arc<Trash>,
}

impl Images {
    /// Opens the repository and removes builds that were interrupted; the lock
    /// on the store says that no other is under way.
    pub(crate) fn open(dir: &Path, making: &Path, trash: Arc<Trash>) -> Result<Self, Error> {
        let repository = Arc::new(Repository::open(dir)?);
        fsio::ensure_private_dir(making).map_err(Error::io("use", making))?;
        let images = Self { repository, making: making.to_path_buf(), trash };
        for entry in fs::read_dir(making).map_err(Error::io("read", making))? {
            images.trash.discard(&entry.map_err(Error::io("read", making))?.path())?;
        }
        Ok(images)
    }

    pub(crate) fn repository(&self) -> &Arc<Repository> {
        &self.repository
    }

    /// A fresh directory for a build, to be given to `publish` or thrown away.
    pub(crate) fn scratch(&self) -> Result<Scratch, Error> {
        let io = |error| Error::io("make a directory in", &self.making)(error);
        let dir = tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(&self.making).map_err(io)?.keep();
        let scratch = Scratch { dir, trash: Arc::clone(&self.trash) };
        fs::create_dir(scratch.tree()).map_err(Error::io("make", scratch.tree()))?;
        Ok(scratch)
    }

    /// Commits a finished build as the head and default of its flavour. What is
    /// the same as the head in everything is that.
    pub(crate) fn publish(&self, scratch: Scratch, config: ImageConfig, made: Made<'_>) -> Result<Image, Error> {
        let staging = self.repository.stage()?;
        let tree = staging.scan(&scratch.tree(), &|_| false)?;
        staging.settle()?;
        // On a full disk a commit may still find room where the build was.
        drop(scratch);
        let recipe = made.recipe.map(|recipe| (recipe.text().to_owned(), recipe.key()));
        let flavour = config.flavour.clone();
        if let Some(head) = self.repository.tagged(&flavour, &Tag::head())? {
            let commit = self.repository.commit(head)?;
            let same_tree = matches!(commit.content, Content::Tree { id, .. } if id == tree.encode().0);
            let same_recipe = commit.recipe_key == recipe.as_ref().map(|(_, key)| *key);
            if same_tree && same_recipe && commit.config == config && self.load(head.digest()).is_ok() {
                return self.follow(head, made);
            }
        }
        let new = NewCommit {
            config,
            author: made.author.to_owned(),
            message: made.message.to_owned(),
            time: SystemTime::now(),
            recipe,
            publish: true,
        };
        let id = self.repository.commit_tree(&staging, &tree, new)?;
        self.load(id.digest())
    }

    /// Lets desktops of its flavour follow an image that is the head.
    fn follow(&self, id: CommitId, made: Made<'_>) -> Result<Image, Error> {
        let image = self.load(id.digest())?;
        let (tag, by) = (Tag::default_tag(), (made.author, made.message));
        self.repository.move_tag(&image.config().flavour, &tag, Expect::Anything, Some(id), by)?;
        Ok(image)
    }

    /// Makes an image that was built before the head and default of its flavour.
    pub(crate) fn again(&self, image: &Image, made: Made<'_>) -> Result<Image, Error> {
        let flavour = &image.config().flavour;
        if self.repository.tagged(flavour, &Tag::head())? == Some(image.id) {
            return self.follow(image.id, made);
        }
        let id = self.repository.revert(image.id, made.author, made.message)?;
        self.follow(id, made)
    }

    /// Reads a commit and checks what can be checked at once.
    pub(crate) fn load(&self, digest: Digest) -> Result<Image, Error> {
        let id = CommitId::new(digest);
        let commit = self.repository.whole(id)?;
        let base = self.repository.base(id)?;
        Ok(Image { id, commit, base, repository: Arc::clone(&self.repository) })
    }

    /// Which commit desktops of a flavour follow.
    pub(crate) fn digest_of(&self, flavour: &FlavourName) -> Result<Digest, Error> {
        let id = self.repository.tagged(flavour, &Tag::default_tag())?;
        Ok(id.ok_or_else(|| Error::NoSuchFlavour(flavour.clone()))?.digest())
    }

    /// The newest sound image that was built by this recipe.
    pub(crate) fn of_recipe(&self, recipe: &Recipe) -> Result<Option<Image>, Error> {
        let mut next = self.repository.tagged(recipe.flavour(), &Tag::head())?;
        while let Some(id) = next {
            // What is damaged is built again, and so is what came before it.
            let Ok(commit) = self.repository.commit(id) else { return Ok(None) };
            if commit.recipe_key == Some(recipe.key())
                && let Ok(image) = self.load(id.digest())
            {
                return Ok(Some(image));
            }
            next = commit.parents.first().copied();
        }
        Ok(None)
    }

    /// Every flavour that desktops can follow, by name.
    pub(crate) fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        let mut found = self.repository.flavours()?;
        found.retain(|flavour| !matches!(self.digest_of(flavour), Err(Error::NoSuchFlavour(_))));
        Ok(found)
    }
}

/// A build's directory. It goes into the trash.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: PathBuf,
    trash: Arc<Trash>,
}

impl Scratch {
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.trash.discard(&self.dir) {
            tracing::warn!(path = %self.dir.display(), %error, "build left behind until the next start");
        }
    }
}
