//! Images on this host: immutable trees under their digest, and flavours that
//! point at them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use qvd_core::{Digest, FlavourName};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{BaseTree, Error, ImageConfig, fsio, trash::Trash, tree};

/// Largest description of an image that is read, in bytes: a recipe's
/// configuration and little else.
const RECORD_MAX_BYTES: u64 = 4 << 20;
const RECORD: &str = "image.json";
const TREE: &str = "tree";
const FLAVOURS: &str = "flavours";
const TEMPORARY: &str = "tmp-";

/// An immutable tree with its configuration, known by the digest of both.
#[derive(Debug, Clone)]
pub struct Image {
    digest: Digest,
    dir: PathBuf,
    record: Record,
}

/// What is written beside a tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// What the digest covers.
    content: Content,
    /// Key of the recipe that it was built by, if any.
    recipe: Option<Digest>,
    created_unix_s: u64,
}

/// What an image's digest covers: change any of it and it is another image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    format: u32,
    tree: Digest,
    entries: u64,
    top_entries: u64,
    size_bytes: u64,
    config: ImageConfig,
}

impl Content {
    const FORMAT: u32 = 1;

    fn digest(&self) -> io::Result<Digest> {
        // serde_json writes fields in the order of the type and maps sorted
        // (`BTreeMap`), so the same content is always the same bytes.
        let json = serde_json::to_vec(self)?;
        Ok(Digest::new(Sha256::new().chain_update("qvd-image\0").chain_update(json).finalize().into()))
    }
}

impl Image {
    /// What it is known by.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// What its recipe says about running it.
    #[must_use]
    pub const fn config(&self) -> &ImageConfig {
        &self.record.content.config
    }

    /// Files, directories, links and nodes in it.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        self.record.content.entries
    }

    /// Bytes of all its regular files.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.record.content.size_bytes
    }

    /// When it was built.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.record.created_unix_s)
    }

    /// Key of the recipe that it was built by; none if it was imported.
    #[must_use]
    pub const fn recipe_key(&self) -> Option<Digest> {
        self.record.recipe
    }

    /// Directory of its files. Nobody may write there.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        self.dir.join(TREE)
    }

    /// Its tree as the base of roots.
    #[must_use]
    pub fn base(&self) -> BaseTree {
        BaseTree::new(self.digest, self.tree())
    }

    /// Reads every file and compares with the digest.
    ///
    /// # Errors
    /// [`Error::Damaged`] when something was changed.
    pub fn verify(&self) -> Result<(), Error> {
        let found = tree::summarize(&self.tree())?;
        let content = &self.record.content;
        let reason = if Digest::new(found.digest) == content.tree {
            return Ok(());
        } else if found.entries != content.entries {
            format!("its tree has {} entries instead of {}", found.entries, content.entries)
        } else {
            "something in its tree was changed".to_owned()
        };
        Err(Error::Damaged { digest: self.digest, reason })
    }
}

/// Where a flavour points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pointer {
    head: Digest,
    default: Digest,
}

/// The images of this host.
#[derive(Debug)]
pub(crate) struct Images {
    dir: PathBuf,
    trash: Arc<Trash>,
}

impl Images {
    pub(crate) fn open(dir: &Path, trash: Arc<Trash>) -> Result<Self, Error> {
        for dir in [dir, &dir.join(FLAVOURS)] {
            fsio::ensure_private_dir(dir).map_err(Error::io("use", dir))?;
        }
        let images = Self { dir: dir.to_path_buf(), trash };
        // Builds that were interrupted; the lock on the store says that no
        // other is under way.
        for name in images.names(dir)? {
            if name.starts_with(TEMPORARY) {
                images.trash.discard(&dir.join(name))?;
            }
        }
        Ok(images)
    }

    /// A fresh directory for a build, to be given to `publish` or thrown away.
    pub(crate) fn scratch(&self) -> Result<Scratch, Error> {
        let io = |error| Error::io("make a directory in", &self.dir)(error);
        let dir = tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(&self.dir).map_err(io)?.keep();
        let scratch = Scratch { dir, trash: Arc::clone(&self.trash) };
        fs::create_dir(scratch.tree()).map_err(Error::io("make", scratch.tree()))?;
        Ok(scratch)
    }

    /// Makes an image of a finished build and lets its flavour point at it.
    pub(crate) fn publish(
        &self,
        scratch: Scratch,
        config: ImageConfig,
        recipe: Option<Digest>,
    ) -> Result<Image, Error> {
        let summary = tree::summarize(&scratch.tree())?;
        let content = Content {
            format: Content::FORMAT,
            tree: Digest::new(summary.digest),
            entries: summary.entries,
            top_entries: summary.top_entries,
            size_bytes: summary.size_bytes,
            config,
        };
        let record_path = scratch.dir.join(RECORD);
        let digest = content.digest().map_err(Error::io("describe image in", &record_path))?;
        let created_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let record = Record { content, recipe, created_unix_s };
        let dir = self.dir.join(digest.hex());
        let write = || -> io::Result<()> {
            fsio::replace(&record_path, &serde_json::to_vec_pretty(&record)?)?;
            // One call instead of an fsync for each of ten thousand files.
            rustix::fs::syncfs(fsio::open_dir(&scratch.dir)?)?;
            Ok(())
        };
        write().map_err(Error::io("write", &record_path))?;
        if self.load(digest).is_err() {
            // What is there under this name, if anything, is damaged.
            self.trash.discard(&dir)?;
            fs::rename(&scratch.dir, &dir).map_err(Error::io("put image in place as", &dir))?;
            fsio::sync_dir(&self.dir).map_err(Error::io("put image in place as", &dir))?;
        }
        // Either renamed, or the same image was there and this copy goes.
        drop(scratch);
        self.point(&record.content.config.flavour, digest)?;
        self.load(digest)
    }

    /// Reads an image's description and checks what can be checked at once.
    pub(crate) fn load(&self, digest: Digest) -> Result<Image, Error> {
        let dir = self.dir.join(digest.hex());
        let damaged = |reason: String| Error::Damaged { digest, reason };
        if let Err(error) = fs::symlink_metadata(&dir)
            && error.kind() == io::ErrorKind::NotFound
        {
            return Err(Error::NoSuchImage(digest));
        }
        let path = dir.join(RECORD);
        let len = fs::metadata(&path).map_err(|e| damaged(format!("its {RECORD} cannot be read: {e}")))?.len();
        if len > RECORD_MAX_BYTES {
            return Err(damaged(format!("its {RECORD} has {len} bytes")));
        }
        let json = fs::read(&path).map_err(|e| damaged(format!("its {RECORD} cannot be read: {e}")))?;
        let record: Record =
            serde_json::from_slice(&json).map_err(|e| damaged(format!("its {RECORD} is not whole: {e}")))?;
        if record.content.format != Content::FORMAT {
            return Err(damaged(format!("its format {} is unknown", record.content.format)));
        }
        if !record.content.digest().is_ok_and(|found| found == digest) {
            return Err(damaged(format!("its {RECORD} was changed")));
        }
        let tree = dir.join(TREE);
        let top = fs::read_dir(&tree).map_err(|e| damaged(format!("its tree cannot be read: {e}")))?.count();
        if !u64::try_from(top).is_ok_and(|top| top == record.content.top_entries) {
            return Err(damaged("its tree is not complete".to_owned()));
        }
        Ok(Image { digest, dir, record })
    }

    /// The image that a flavour points at.
    pub(crate) fn of_flavour(&self, flavour: &FlavourName) -> Result<Image, Error> {
        self.load(self.digest_of(flavour)?)
    }

    /// Which image a flavour points at.
    pub(crate) fn digest_of(&self, flavour: &FlavourName) -> Result<Digest, Error> {
        Ok(self.pointer(flavour)?.ok_or_else(|| Error::NoSuchFlavour(flavour.clone()))?.default)
    }

    /// A sound image that was built by the recipe with this key.
    pub(crate) fn of_recipe(&self, key: Digest) -> Result<Option<Image>, Error> {
        let mut found: Option<Image> = None;
        for name in self.names(&self.dir)? {
            let Ok(digest) = format!("sha256:{name}").parse() else { continue };
            let Ok(image) = self.load(digest) else { continue };
            if image.recipe_key() == Some(key) && found.as_ref().is_none_or(|newest| newest.created() < image.created())
            {
                found = Some(image);
            }
        }
        Ok(found)
    }

    /// Lets a flavour point at an image.
    pub(crate) fn point(&self, flavour: &FlavourName, digest: Digest) -> Result<(), Error> {
        let path = self.pointer_path(flavour);
        let json = serde_json::to_vec(&Pointer { head: digest, default: digest }).map_err(io::Error::from);
        json.and_then(|json| fsio::replace(&path, &json)).map_err(Error::io("write", &path))
    }

    fn pointer(&self, flavour: &FlavourName) -> Result<Option<Pointer>, Error> {
        match fs::read(self.pointer_path(flavour)) {
            Ok(json) => serde_json::from_slice(&json)
                .map(Some)
                .map_err(|e| Error::DamagedFlavour { flavour: flavour.clone(), reason: e.to_string() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", self.pointer_path(flavour))(error)),
        }
    }

    fn pointer_path(&self, flavour: &FlavourName) -> PathBuf {
        self.dir.join(FLAVOURS).join(format!("{flavour}.json"))
    }

    /// Every flavour that points at an image, by name.
    pub(crate) fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        let names = self.names(&self.dir.join(FLAVOURS))?;
        let mut found: Vec<FlavourName> =
            names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
        found.sort();
        Ok(found)
    }

    fn names(&self, dir: &Path) -> Result<Vec<String>, Error> {
        let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().ok())).collect();
        let names: io::Result<Vec<Option<String>>> = read();
        let names = names.map_err(Error::io("read", dir))?;
        Ok(names.into_iter().flatten().collect())
    }
}

/// A build's directory. It goes into the trash unless it was renamed away.
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
        self.dir.join(TREE)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.trash.discard(&self.dir) {
            tracing::warn!(path = %self.dir.display(), %error, "build left behind until the next start");
        }
    }
}
