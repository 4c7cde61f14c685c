//! Everything that a host keeps for its desktops, in one directory.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use qvd_core::{Digest, FlavourName, RootPolicy, Support};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{
    Backends, BuildOptions, Capability, Error, Home, HomeId, HomeOptions, Image, ImageConfig, Recipe, Root,
    RootBackend, RootId, RootOptions, build, fsio,
    guests::Guests,
    image::{Images, Made},
    probe,
    repository::{CommitId, Repository},
    roots::Roots,
    trash::Trash,
};

/// Images, roots and homes of one host.
///
/// Calls may come from many threads; builds wait for each other. Two processes
/// cannot have the same store open.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    images: Images,
    roots: Roots,
    guests: Guests,
    trash: Arc<Trash>,
    building: Mutex<()>,
    // Last, so that nobody else opens the store before the rest is dropped.
    _lock: File,
}

/// A root that outlived its desktop's run, and the commit that it stands on.
pub struct KeptRoot {
    /// What the root was made from.
    pub commit: CommitId,
    /// The root, not mounted.
    pub root: Box<dyn Root>,
}

/// An image, and whether it had to be built.
#[derive(Debug, Clone)]
pub struct Built {
    /// The image, which its flavour now points at.
    pub image: Image,
    /// Whether it was there already.
    pub reused: bool,
}

impl Store {
    /// Opens the store in `root`, making what is missing, and removes what a
    /// killed process left half done.
    ///
    /// # Errors
    /// [`Error::StoreBusy`] while another process has it open.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Self::open_with(root, Backends::built_in())
    }

    /// As [`Store::open`], with these ways to make roots.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(root: &Path, backends: Backends) -> Result<Self, Error> {
        std::fs::create_dir_all(root).map_err(Error::io("make", root))?;
        fsio::ensure_private_dir(root).map_err(Error::io("use", root))?;
        let root = root.canonicalize().map_err(Error::io("open", root))?;
        let lock = lock(&root)?;
        let trash = Arc::new(Trash::open(&root.join("trash"))?);
        let images = Images::open(&root.join("images"), &root.join("making"), Arc::clone(&trash))?;
        trash.take_temporary(&root.join("homes"))?;
        trash.take_temporary(&root.join("home-disks"))?;
        let roots = Roots::open(&root.join("roots"), backends, Arc::clone(&trash))?;
        roots.forget_bases(&|digest| !images.repository().has_commit(CommitId::new(digest)))?;
        let guests = Guests::open(&root, images.repository(), &trash)?;
        Ok(Self { images, roots, guests, trash, building: Mutex::new(()), _lock: lock, root })
    }

    /// Makes roots by the back end `name` from now on, where neither the caller
    /// nor the image asks for another.
    ///
    /// # Errors
    /// [`Error::NoSuchBackend`].
    pub fn with_default_backend(mut self, name: &str) -> Result<Self, Error> {
        self.roots.set_default(name)?;
        Ok(self)
    }

    /// The back end `name`, opened at its first use.
    ///
    /// # Errors
    /// [`Error::NoSuchBackend`], or it cannot be opened.
    pub fn backend(&self, name: &str) -> Result<Arc<dyn RootBackend>, Error> {
        self.roots.backend(name)
    }

    /// The names of all back ends that there are, whether they work here or not.
    pub fn backends(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.roots.names()
    }

    /// What machines are given.
    pub(crate) const fn guests(&self) -> &Guests {
        &self.guests
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.root
    }

    /// Builds the image of a recipe, or finds that it was built before, and
    /// lets its flavour point at it. `progress` gets lines for a person.
    ///
    /// # Errors
    /// The recipe could not be carried out; nothing is left of the attempt.
    pub fn build(
        &self,
        recipe: &Recipe,
        options: &BuildOptions,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Built, Error> {
        let _one_at_a_time = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let made = Made { author: &options.author, message: &options.message, recipe: Some(recipe) };
        if !options.rebuild
            && let Some(image) = self.images.of_recipe(recipe)?
        {
            return Ok(Built { image: self.images.again(&image, made)?, reused: true });
        }
        let scratch = self.images.scratch()?;
        build::build(recipe, options, &scratch, &self.trash, progress)?;
        progress("committing the tree");
        let image = self.images.publish(scratch, recipe.config().clone(), made)?;
        Ok(Built { image, reused: false })
    }

    /// Makes an image of a tree that the caller has: `fill` gets an empty
    /// directory to put it in, with the ids that are to exist inside.
    ///
    /// # Errors
    /// `fill` failed or the tree could not be stored; nothing is left.
    pub fn import(&self, config: ImageConfig, fill: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<Image, Error> {
        let scratch = self.images.scratch()?;
        fill(&scratch.tree()).map_err(Error::io("fill image in", scratch.dir()))?;
        self.images.publish(scratch, config, Made { author: "qvd", message: "imported", recipe: None })
    }

    /// The repository that its images are commits of.
    #[must_use]
    pub fn repository(&self) -> &Arc<Repository> {
        self.images.repository()
    }

    /// The image with this digest.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], or [`Error::Damaged`] when a look at it shows that.
    pub fn image(&self, digest: Digest) -> Result<Image, Error> {
        self.images.load(digest)
    }

    /// The image that desktops of a flavour start from.
    ///
    /// # Errors
    /// [`Error::NoSuchFlavour`], or as [`Store::image`].
    pub fn flavour(&self, flavour: &FlavourName) -> Result<Image, Error> {
        self.images.load(self.images.digest_of(flavour)?)
    }

    /// Which image desktops of a flavour start from; it may be damaged.
    ///
    /// # Errors
    /// [`Error::NoSuchFlavour`], or its tag cannot be read.
    pub fn digest_of(&self, flavour: &FlavourName) -> Result<Digest, Error> {
        self.images.digest_of(flavour)
    }

    /// Every flavour that has an image, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        self.images.flavours()
    }

    /// Reads a whole image and compares it with its digest.
    ///
    /// # Errors
    /// As [`Store::image`] and [`Image::verify`].
    pub fn verify(&self, digest: Digest) -> Result<(), Error> {
        self.image(digest)?.verify()
    }

    /// Makes a root on an image, or finds it: see [`RootBackend::create`]. A
    /// root that is there stays with the back end that made it; a new one is
    /// made by the one that the image's recipe names, or else the store's default.
    ///
    /// # Errors
    /// As [`RootBackend::create`].
    pub fn root(&self, image: &Image, id: &RootId, options: impl Into<RootOptions>) -> Result<Box<dyn Root>, Error> {
        self.make_root(image.config().defaults.backend.as_deref(), image, id, &options.into())
    }

    /// As [`Store::root`], by the back end `backend` if the root is a new one.
    ///
    /// # Errors
    /// [`Error::NoSuchBackend`], or as [`RootBackend::create`].
    pub fn root_by(
        &self,
        backend: &str,
        image: &Image,
        id: &RootId,
        options: impl Into<RootOptions>,
    ) -> Result<Box<dyn Root>, Error> {
        self.make_root(Some(backend), image, id, &options.into())
    }

    /// A root that is kept, and the commit that it stands on; none if it is not
    /// there, or would be forgotten.
    ///
    /// # Errors
    /// As [`RootBackend::create`], or the commit cannot be used any more.
    pub fn kept_root(&self, id: &RootId) -> Result<Option<KeptRoot>, Error> {
        if self.roots.find(id)? != Some(RootPolicy::Persistent) {
            return Ok(None);
        }
        let Some(commit) = self.images.repository().leased(id)? else { return Ok(None) };
        let image = self.image(commit.digest())?;
        let root = self.roots.create(None, &image.base(), id, &RootPolicy::Persistent.into())?;
        Ok(Some(KeptRoot { commit, root }))
    }

    fn make_root(
        &self,
        by: Option<&str>,
        image: &Image,
        id: &RootId,
        options: &RootOptions,
    ) -> Result<Box<dyn Root>, Error> {
        let kept = options.policy == RootPolicy::Persistent;
        self.images.repository().lease(id, CommitId::new(image.digest()), kept)?;
        self.roots.create(by, &image.base(), id, options)
    }

    /// The images that roots of this store stand on, running or kept: what
    /// garbage collection has to leave.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn in_use(&self) -> Result<Vec<CommitId>, Error> {
        self.images.repository().in_use(&self.root)
    }

    /// Removes a root for good: see [`RootBackend::remove`].
    ///
    /// # Errors
    /// As [`RootBackend::remove`].
    pub fn remove_root(&self, id: &RootId) -> Result<(), Error> {
        self.roots.remove(id)?;
        self.images.repository().release(id)
    }

    /// Every root on this host, by name, and what becomes of it at a stop.
    ///
    /// # Errors
    /// As [`RootBackend::roots`].
    pub fn roots(&self) -> Result<Vec<(RootId, RootPolicy)>, Error> {
        self.roots.all()
    }

    /// Deletes, before it returns, what was removed so far. Otherwise that goes
    /// on beside other work, and after the next open if the store is closed first.
    ///
    /// # Errors
    /// Something cannot be deleted; the next open tries again.
    pub fn empty_trash(&self) -> Result<(), Error> {
        self.trash.empty()
    }

    /// The home of a user or a desktop: a directory without limits, made at its first use.
    ///
    /// # Errors
    /// As [`Home::open`].
    pub fn home(&self, id: &HomeId, image: &Image) -> Result<Home, Error> {
        self.home_with(id, image, &HomeOptions::default())
    }

    /// The home of a user or a desktop, made at its first use in this way. One
    /// that is there stays of its kind.
    ///
    /// # Errors
    /// As [`Home::open`]; [`Error::Unsupported`] when a limit would not hold, or
    /// the home that is there was made in another way.
    pub fn home_with(&self, id: &HomeId, image: &Image, options: &HomeOptions) -> Result<Home, Error> {
        let [dir, disk] = self.home_paths(id);
        for path in [&dir, &disk] {
            let parent = path.parent().unwrap_or(&self.root);
            fsio::ensure_private_dir(parent).map_err(Error::io("use", parent))?;
        }
        let (home, fresh) = Home::in_store(&dir, &disk, image, options)?;
        if let Some(fresh) = fresh {
            self.trash.later(move || fresh.settle_or_say());
        }
        Ok(home)
    }

    /// Removes a home and everything in it. Removing what is not there is `Ok`.
    ///
    /// # Errors
    /// It could not be moved out of the way; [`Error::HomeBusy`] while one with
    /// a file system of its own is mounted.
    pub fn remove_home(&self, id: &HomeId) -> Result<(), Error> {
        let [dir, disk] = self.home_paths(id);
        Home::expect_unused(&disk)?;
        self.trash.discard(&disk)?;
        self.trash.discard(&dir)
    }

    /// Where a home is, as a directory and as a file system of its own.
    fn home_paths(&self, id: &HomeId) -> [PathBuf; 2] {
        ["homes", "home-disks"].map(|kind| self.root.join(kind).join(id.to_string()))
    }

    /// What this host can do for roots, found by doing it below the store.
    ///
    /// # Errors
    /// It could not be found out, for instance because the disk is full.
    pub fn probe(&self) -> Result<Vec<(&'static str, Support)>, Error> {
        let backend = self.roots.backend(self.roots.default_name())?;
        let name = backend.name();
        let backend = backend.capabilities()?;
        Ok(vec![
            (name, backend.get(Capability::Roots)),
            ("id-mapped layers", backend.get(Capability::IdMapped)),
            ("mounting images", probe::images(&self.root)?),
            ("volatile roots", backend.get(Capability::Volatile)),
            ("image building (mmdebstrap)", build::support()),
            ("reflink", probe::reflink(&self.root).map_err(Error::io("probe reflink below", &self.root))?),
        ])
    }
}

fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join("lock");
    let file =
        File::options().write(true).create(true).truncate(false).open(&path).map_err(Error::io("open", &path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(Error::StoreBusy(root.to_path_buf())),
        Err(error) => Err(Error::io("lock", &path)(error)),
    }
}
