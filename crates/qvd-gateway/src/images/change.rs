//! What changes a repository, or writes out of it.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use axum::http::Method;
use qvd_core::{FlavourName, Tag, UserName};
use qvd_farm::{ErrorKind, FarmError};
use qvd_storage::{
    Error, Recipe, Repository,
    repository::{
        Collected, Content, Expect, Keep, Logged, NewCommit, Reference, Revision, Rollout, Tree,
        archive::{Format, is_disk},
    },
};
use serde::{Deserialize, Serialize};

use super::{ImageCall, News, Tagged, storage};

/// Puts a tag on a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutTag {
    /// Of which flavour.
    pub flavour: FlavourName,
    /// Its name.
    pub tag: Tag,
    /// The commit; where the flavour's `head` is, unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Reference>,
    /// Who puts it there.
    pub author: String,
    /// Why.
    pub message: String,
    /// In which steps desktops get it; without any, all at their next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
}

impl ImageCall for PutTag {
    type Answer = Tagged;
    const METHOD: Method = Method::PUT;
    const PATH: &'static str = "tags";

    fn cannot(&self) -> String {
        format!("cannot put `{}` of {}", self.tag, self.flavour)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Tagged, FarmError> {
        let cannot = self.cannot();
        let Self { flavour, tag, to, author, message, rollout } = self;
        let by = (author.as_str(), message.as_str());
        let put = || {
            let to = to.unwrap_or_else(|| Reference { flavour: flavour.clone(), revision: None });
            let to = repository.resolve(&to)?;
            // Without steps, those under way end: all get it.
            let under_way = repository.rollout(&flavour, &tag)?.map(|_| Rollout::default());
            match rollout.or(under_way) {
                Some(rollout) => repository.publish(&flavour, &tag, to, rollout, by)?,
                None => repository.move_tag(&flavour, &tag, Expect::Anything, Some(to), by)?,
            };
            Tagged::of(repository, &flavour, tag, to)
        };
        put().map_err(storage(&cannot))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }
}

/// Removes a tag; not `head`, which goes with its flavour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveTag {
    /// Of which flavour.
    pub flavour: FlavourName,
    /// Its name.
    pub tag: Tag,
    /// Who removes it.
    pub author: String,
}

impl RemoveTag {
    fn image(&self) -> Reference {
        Reference { flavour: self.flavour.clone(), revision: Some(Revision::Tag(self.tag.clone())) }
    }
}

impl ImageCall for RemoveTag {
    type Answer = Reference;
    const METHOD: Method = Method::DELETE;
    const PATH: &'static str = "tags";

    fn cannot(&self) -> String {
        format!("cannot remove the tag {}", self.image())
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Reference, FarmError> {
        let remove = || {
            repository.resolve(&self.image())?;
            if self.tag == Tag::head() {
                return Ok(false);
            }
            repository.move_tag(&self.flavour, &self.tag, Expect::Anything, None, (&self.author, "removed"))?;
            Ok(true)
        };
        if !remove().map_err(storage(&self.cannot()))? {
            // Without it the flavour's history could neither be seen nor go on.
            let why = "a flavour has it for as long as it is there; `qvd image rm` removes the flavour";
            return Err(FarmError::new(ErrorKind::Invalid, format!("{}: {why}", self.cannot())));
        }
        Ok(self.image())
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }
}

/// Removes a flavour with all its tags; its commits go by [`Gc`]. A daemon refuses
/// it while desktops follow the flavour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remove {
    /// Which.
    pub flavour: FlavourName,
    /// Who removes it.
    pub author: String,
}

impl ImageCall for Remove {
    type Answer = FlavourName;
    const METHOD: Method = Method::DELETE;
    const PATH: &'static str = "flavours";

    fn removes(&self) -> Option<&FlavourName> {
        Some(&self.flavour)
    }

    fn cannot(&self) -> String {
        format!("cannot remove flavour {}", self.flavour)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<FlavourName, FarmError> {
        let remove = || {
            let tags = repository.tags(&self.flavour)?;
            if tags.is_empty() {
                return Err(Error::NoSuchFlavour(self.flavour.clone()));
            }
            let by = (self.author.as_str(), "flavour removed");
            let gone = |tag| repository.move_tag(&self.flavour, tag, Expect::Anything, None, by).map(drop);
            tags.keys().try_for_each(gone)
        };
        remove().map_err(storage(&self.cannot()))?;
        Ok(self.flavour)
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }
}

/// Makes an earlier commit's content the next version of its flavour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revert {
    /// The commit to go back to.
    pub image: Reference,
    /// Who does it.
    pub author: String,
    /// Why.
    pub message: String,
}

impl ImageCall for Revert {
    type Answer = Logged;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "revert";

    fn cannot(&self) -> String {
        format!("cannot go back to {}", self.image)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Logged, FarmError> {
        let revert = || {
            let to = repository.resolve(&self.image)?;
            repository.logged(repository.revert(to, &self.author, &self.message)?)
        };
        revert().map_err(storage(&self.cannot()))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }
}

/// Makes a commit of a directory, an archive or a disk of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// Directory, archive or disk: an absolute path of the host.
    pub source: PathBuf,
    /// Flavour that it is the next version of.
    pub flavour: FlavourName,
    /// Why it was made.
    pub message: String,
    /// Who made it.
    pub author: String,
    /// Text of the recipe that says how it runs; without one it runs as the
    /// flavour's `head` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Whether it is the plain content of a disk, whatever its name.
    #[serde(default)]
    pub disk: bool,
    /// Most bytes that an archive or a disk may hold.
    pub max_bytes: u64,
    /// Whether desktops are to follow it at once: moves `default` too.
    #[serde(default)]
    pub publish: bool,
}

/// What was imported, before it is committed.
enum Made {
    Tree(Tree),
    Disk(Content),
}

impl ImageCall for Import {
    type Answer = Logged;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "import";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        format!("cannot import `{}`", self.source.display())
    }

    fn carry_out(self, repository: &Repository, news: &mut (dyn FnMut(News) + Send)) -> Result<Logged, FarmError> {
        let cannot = self.cannot();
        let invalid = |why: &str| FarmError::new(ErrorKind::Invalid, format!("{cannot}: {why}"));
        let recipe = self.recipe.as_deref().map(Recipe::parse).transpose();
        let recipe = recipe.map_err(|error| FarmError::new(ErrorKind::Invalid, &cannot).because(error))?;
        if let Some(recipe) = recipe.as_ref().filter(|recipe| *recipe.flavour() != self.flavour) {
            return Err(invalid(&format!("the recipe is of flavour {}, not of {}", recipe.flavour(), self.flavour)));
        }
        let disk = self.disk || is_disk(&self.source).map_err(|error| unread(&cannot, error))?;
        news(News { text: format!("reading `{}`", self.source.display()), amount: None });
        let import = || {
            let staging = repository.stage()?;
            let made = match disk {
                true => Made::Disk(staging.import_disk(&self.source, self.max_bytes)?),
                false => Made::Tree(staging.import(&self.source, self.max_bytes)?),
            };
            staging.settle()?;
            let config = match (recipe, &made) {
                (Some(recipe), _) => recipe.config().clone(),
                (None, Made::Tree(tree)) => repository.config_for(&self.flavour, tree)?,
                (None, Made::Disk(_)) => repository.config_of_head(&self.flavour)?,
            };
            let new = NewCommit {
                config,
                author: self.author,
                message: self.message,
                time: SystemTime::now(),
                recipe: None,
                publish: self.publish,
            };
            let id = match made {
                Made::Tree(tree) => repository.commit_tree(&staging, &tree, new)?,
                Made::Disk(disk) => repository.commit_disk(&staging, disk, new)?,
            };
            repository.logged(id)
        };
        import().map_err(storage(&cannot))
    }

    fn asked_by(&mut self, user: &UserName) {
        self.author = user.to_string();
    }

    fn host_path(&self) -> Option<&Path> {
        Some(&self.source)
    }
}

fn unread(cannot: &str, error: io::Error) -> FarmError {
    match error.kind() {
        io::ErrorKind::NotFound => FarmError::new(ErrorKind::NotFound, format!("{cannot}: there is no such file")),
        _ => FarmError::new(ErrorKind::Failed, cannot).because(error),
    }
}

/// Forms that a commit is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExportFormat {
    /// A directory.
    Dir,
    /// A tar archive.
    Tar,
    /// The same, compressed with gzip.
    TarGz,
    /// The same, compressed with zstd.
    TarZst,
    /// An OCI archive.
    Oci,
}

/// Writes what a commit holds to a place of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Which.
    pub image: Reference,
    /// Where: an absolute path of the host.
    pub to: PathBuf,
    /// What it becomes; what its name says, unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ExportFormat>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Which.
    pub image: Reference,
    /// Where.
    pub to: PathBuf,
}

impl ImageCall for Export {
    type Answer = Exported;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "export";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        format!("cannot write {} to `{}`", self.image, self.to.display())
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Exported, FarmError> {
        let format = match self.format {
            None => Format::of(&self.to),
            Some(ExportFormat::Dir) => Format::Directory,
            Some(ExportFormat::Tar) => Format::Tar,
            Some(ExportFormat::TarGz) => Format::TarGz,
            Some(ExportFormat::TarZst) => Format::TarZst,
            Some(ExportFormat::Oci) => Format::Oci,
        };
        let export = || repository.export(repository.resolve(&self.image)?, &self.to, format);
        export().map_err(storage(&self.cannot()))?;
        Ok(Exported { image: self.image, to: self.to })
    }

    fn host_path(&self) -> Option<&Path> {
        Some(&self.to)
    }
}

/// Deletes what no tag, no recent past of a tag and no desktop needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gc {
    /// Whether to say only what would be deleted.
    pub dry_run: bool,
    /// Days for which a tag's past is kept.
    pub keep_days: u32,
}

impl ImageCall for Gc {
    type Answer = Collected;
    const METHOD: Method = Method::POST;
    const PATH: &'static str = "gc";
    const LONG: bool = true;

    fn cannot(&self) -> String {
        "cannot collect what is not needed".to_owned()
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Collected, FarmError> {
        let collect = || {
            // Roots and disks of desktops are beside the repository.
            let commits = repository.in_use(repository.dir().parent().unwrap_or_else(|| repository.dir()))?;
            let keep = Keep { reflog: Duration::from_secs(u64::from(self.keep_days) * 86_400), commits };
            repository.gc(&keep, self.dry_run)
        };
        collect().map_err(storage(&self.cannot()))
    }
}
