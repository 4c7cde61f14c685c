//! What only looks.

use axum::http::Method;
use qvd_core::{FlavourName, Tag};
use qvd_farm::FarmError;
use qvd_storage::{
    Error, Repository,
    repository::{Commit, CommitId, Diff, Logged, Move, Reference, Revision, Rollout},
};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Map, Value};

use super::{ImageCall, News, storage};

/// What a commit came from, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Where to begin.
    pub image: Reference,
}

impl ImageCall for Log {
    type Answer = Vec<Logged>;
    const METHOD: Method = Method::GET;
    const PATH: &'static str = "log";

    fn cannot(&self) -> String {
        format!("cannot show the history of {}", self.image)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Vec<Logged>, FarmError> {
        let log = repository.resolve(&self.image).and_then(|id| repository.log(id));
        log.map_err(storage(&self.cannot()))
    }
}

/// All about a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Show {
    /// Which.
    pub image: Reference,
}

/// A commit with everything that it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Its id.
    pub id: CommitId,
    /// Tags that are on it.
    pub tags: Vec<Tag>,
    /// The commit.
    #[serde(flatten)]
    pub commit: Commit,
    /// Flavour that it is of.
    pub flavour: FlavourName,
    /// Packages in it.
    pub package_count: usize,
    /// Ids of the keys that it is signed by.
    pub signers: Vec<String>,
}

impl<'de> Deserialize<'de> for Shown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Around {
            id: CommitId,
            tags: Vec<Tag>,
            flavour: FlavourName,
            package_count: usize,
            signers: Vec<String>,
        }
        let mut fields = Map::deserialize(deserializer)?;
        let around = Around::deserialize(Value::Object(fields.clone())).map_err(D::Error::custom)?;
        // A commit knows all of its own fields, and refuses others.
        for name in ["id", "tags", "flavour", "package_count", "signers"] {
            fields.remove(name);
        }
        let commit = Commit::deserialize(Value::Object(fields)).map_err(D::Error::custom)?;
        let Around { id, tags, flavour, package_count, signers } = around;
        Ok(Self { id, tags, commit, flavour, package_count, signers })
    }
}

impl ImageCall for Show {
    type Answer = Shown;
    const METHOD: Method = Method::GET;
    const PATH: &'static str = "show";

    fn cannot(&self) -> String {
        format!("cannot show {}", self.image)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Shown, FarmError> {
        let show = || {
            let id = repository.resolve(&self.image)?;
            let commit = repository.commit(id)?;
            let flavour = commit.flavour().clone();
            let tags = repository.tags_by_commit(&flavour)?.remove(&id).unwrap_or_default();
            let package_count = repository.packages(&commit)?.map_or(0, |packages| packages.versions.len());
            let signers = repository.signers(id)?;
            Ok::<_, Error>(Shown { id, tags, commit, flavour, package_count, signers })
        };
        show().map_err(storage(&self.cannot()))
    }
}

/// The files and packages that differ between two commits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// The older one.
    pub from: Reference,
    /// The newer one.
    pub to: Reference,
}

impl ImageCall for Compare {
    type Answer = Diff;
    const METHOD: Method = Method::GET;
    const PATH: &'static str = "diff";

    fn cannot(&self) -> String {
        format!("cannot compare {} with {}", self.from, self.to)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Diff, FarmError> {
        let commit = |image| repository.commit(repository.resolve(image)?);
        let diff = || repository.diff(&commit(&self.from)?, &commit(&self.to)?);
        diff().map_err(storage(&self.cannot()))
    }
}

/// The tags of a flavour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tags {
    /// Which.
    pub flavour: FlavourName,
}

/// A tag, and the commit that it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tagged {
    /// Of which flavour.
    pub flavour: FlavourName,
    /// Its name.
    pub tag: Tag,
    /// Where it is.
    pub commit: CommitId,
    /// In which steps desktops get it, while these are under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
}

impl Tagged {
    pub(super) fn of(
        repository: &Repository,
        flavour: &FlavourName,
        tag: Tag,
        commit: CommitId,
    ) -> Result<Self, Error> {
        let rollout = repository.rollout(flavour, &tag)?.filter(|rollout| *rollout != Rollout::default());
        Ok(Self { flavour: flavour.clone(), tag, commit, rollout })
    }
}

impl ImageCall for Tags {
    type Answer = Vec<Tagged>;
    const METHOD: Method = Method::GET;
    const PATH: &'static str = "tags";

    fn cannot(&self) -> String {
        format!("cannot list the tags of {}", self.flavour)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Vec<Tagged>, FarmError> {
        let row = |(tag, commit)| Tagged::of(repository, &self.flavour, tag, commit);
        let tags = || match repository.tags(&self.flavour)? {
            tags if tags.is_empty() => Err(Error::NoSuchFlavour(self.flavour.clone())),
            tags => tags.into_iter().map(row).collect(),
        };
        tags().map_err(storage(&self.cannot()))
    }
}

/// Where a tag has been, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reflog {
    /// A flavour, whose `head` is meant, or a tag of it.
    pub image: Reference,
}

impl ImageCall for Reflog {
    type Answer = Vec<Move>;
    const METHOD: Method = Method::GET;
    const PATH: &'static str = "reflog";

    fn cannot(&self) -> String {
        format!("cannot show where {} has been", self.image)
    }

    fn carry_out(self, repository: &Repository, _: &mut (dyn FnMut(News) + Send)) -> Result<Vec<Move>, FarmError> {
        let tag = match &self.image.revision {
            Some(Revision::Tag(tag)) => tag.clone(),
            _ => Tag::head(),
        };
        let mut moves = repository.reflog(&self.image.flavour, &tag).map_err(storage(&self.cannot()))?;
        moves.reverse();
        Ok(moves)
    }
}
