//! Publishing in steps: who gets a new commit first, and until when others may
//! go on with the old one.

use std::{
    fs, io,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use qvd_core::{FlavourName, Tag};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{CommitId, Expect, Move, Repository, lock::Lock};
use crate::{Error, fsio};

/// How a commit is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// How many of a hundred desktops get it already at their next start.
    pub canary_percent: u8,
    /// How long after its publication people are asked to leave the old one.
    pub soft_after_s: Option<u64>,
    /// How long after it desktops of the old one are stopped.
    pub hard_after_s: Option<u64>,
}

impl Default for Rollout {
    /// Everybody gets it at the next start, and nobody is urged.
    fn default() -> Self {
        Self { canary_percent: 100, soft_after_s: None, hard_after_s: None }
    }
}

/// What a running desktop has to expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Due {
    /// Nothing: it runs what it would get at a start, or there is no hurry.
    Nothing,
    /// Its user is to be asked to leave it.
    Soft,
    /// It is to be stopped.
    Hard,
}

/// A rollout under way, as it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// What is published. It counts only while the tag is there.
    commit: CommitId,
    /// What the tag was on before.
    before: Option<CommitId>,
    published_unix_s: u64,
    rollout: Rollout,
}

/// What desktops that follow a tag get, as it was when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Followed {
    to: CommitId,
    kept: Option<Kept>,
}

impl Followed {
    /// The commit that `who` gets at its next start.
    #[must_use]
    pub fn commit(&self, who: &str) -> CommitId {
        let before = self.kept.filter(|kept| !is_canary(who, self.to, kept.rollout.canary_percent));
        before.and_then(|kept| kept.before).unwrap_or(self.to)
    }

    /// What `who` has to expect that has run `running` until `now`.
    #[must_use]
    pub fn due(&self, who: &str, running: CommitId, now: SystemTime) -> Due {
        let Some(kept) = self.kept.filter(|_| self.commit(who) != running) else { return Due::Nothing };
        let since = UNIX_EPOCH + Duration::from_secs(kept.published_unix_s);
        let passed = |after: Option<u64>| after.is_some_and(|after| now >= since + Duration::from_secs(after));
        match (passed(kept.rollout.soft_after_s), passed(kept.rollout.hard_after_s)) {
            (_, true) => Due::Hard,
            (true, false) => Due::Soft,
            (false, false) => Due::Nothing,
        }
    }
}

impl Repository {
    /// Puts a tag on a commit that desktops are to get in steps. Publishing what
    /// the tag is on already changes the steps: a larger percentage only adds
    /// desktops to those that had it.
    ///
    /// # Errors
    /// As [`Repository::move_tag`]; a percentage above 100, or a hard expiry
    /// before the soft one, is refused.
    pub fn publish(
        &self,
        flavour: &FlavourName,
        tag: &Tag,
        to: CommitId,
        rollout: Rollout,
        by: (&str, &str),
    ) -> Result<Move, Error> {
        if rollout.canary_percent > 100 {
            return Err(Error::Refused(format!("there is no percentage {}", rollout.canary_percent)));
        }
        if let (Some(soft), Some(hard)) = (rollout.soft_after_s, rollout.hard_after_s)
            && hard < soft
        {
            return Err(Error::Refused("desktops cannot be stopped before their users are asked".to_owned()));
        }
        let here = self.tagged(flavour, tag)?;
        let known = self.kept(flavour, tag)?.filter(|kept| kept.commit == to && here == Some(to));
        let kept = match known {
            Some(known) => Kept { rollout, ..known },
            None => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                Kept { commit: to, before: here.filter(|here| *here != to), published_unix_s: now, rollout }
            }
        };
        // It is there before the tag moves: nobody gets the new commit too early.
        let path = self.rollout_path(flavour, tag);
        let dir = path.with_file_name("");
        fsio::ensure_private_dir(&self.flavour_dir(flavour)).map_err(Error::io("use", &dir))?;
        fsio::ensure_private_dir(&dir).map_err(Error::io("use", &dir))?;
        {
            let _one_at_a_time = Lock::alone(&self.flavour_dir(flavour).join("lock"))?;
            let json = serde_json::to_vec(&kept).map_err(io::Error::from);
            json.and_then(|json| fsio::replace(&path, &json)).map_err(Error::io("write", &path))?;
        }
        self.move_tag(flavour, tag, Expect::At(here), Some(to), by)
    }

    /// What desktops that follow a tag get, read once for all of them.
    ///
    /// # Errors
    /// [`Error::NoSuchFlavour`] or [`Error::NoSuchTag`].
    pub fn followed(&self, flavour: &FlavourName, tag: &Tag) -> Result<Followed, Error> {
        let Some(to) = self.tagged(flavour, tag)? else {
            let known: Vec<String> = self.tags(flavour)?.keys().map(|tag| format!("`{tag}`")).collect();
            return Err(match known.is_empty() {
                true => Error::NoSuchFlavour(flavour.clone()),
                false => Error::NoSuchTag { flavour: flavour.clone(), tag: tag.clone(), known },
            });
        };
        let mut kept = self.kept(flavour, tag)?.filter(|kept| kept.commit == to);
        if let Some(kept) = &mut kept {
            kept.before.take_if(|before| !self.has_commit(*before));
        }
        Ok(Followed { to, kept })
    }

    /// The commit that `who` gets at its next start: what the tag is on, or what
    /// it was on before while only others have the new one.
    ///
    /// # Errors
    /// As [`Repository::followed`].
    pub fn follow(&self, flavour: &FlavourName, tag: &Tag, who: &str) -> Result<CommitId, Error> {
        Ok(self.followed(flavour, tag)?.commit(who))
    }

    /// The rollout of what a tag is on now, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn rollout(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<Rollout>, Error> {
        let at = self.tagged(flavour, tag)?;
        Ok(self.kept(flavour, tag)?.filter(|kept| Some(kept.commit) == at).map(|kept| kept.rollout))
    }

    /// What a tag was on before the rollout that is under way.
    pub(crate) fn before_rollout(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<CommitId>, Error> {
        let at = self.tagged(flavour, tag)?;
        Ok(self.kept(flavour, tag)?.filter(|kept| Some(kept.commit) == at).and_then(|kept| kept.before))
    }

    /// Forgets how another commit than `to` was published.
    pub(crate) fn end_rollout(&self, flavour: &FlavourName, tag: &Tag, to: Option<CommitId>) -> Result<(), Error> {
        let path = self.rollout_path(flavour, tag);
        if !path.exists() || self.kept(flavour, tag).is_ok_and(|kept| kept.map(|kept| kept.commit) == to) {
            return Ok(());
        }
        fs::remove_file(&path).map_err(Error::io("remove", &path))
    }

    fn kept(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<Kept>, Error> {
        let path = self.rollout_path(flavour, tag);
        match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|error| Error::DamagedPart {
                what: format!("rollout of `{tag}` of flavour {flavour}"),
                reason: error.to_string(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    fn rollout_path(&self, flavour: &FlavourName, tag: &Tag) -> PathBuf {
        self.flavour_dir(flavour).join("rollout").join(tag.as_str())
    }
}

/// Whether somebody is among the first so many of a hundred. Each commit has
/// other first ones, and each of them stays one as the percentage grows.
fn is_canary(who: &str, commit: CommitId, percent: u8) -> bool {
    let hash: [u8; 32] = Sha256::new().chain_update(commit.digest().bytes()).chain_update(who).finalize().into();
    let number = hash.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    number % 100 < u64::from(percent)
}

#[cfg(test)]
mod tests {
    use qvd_core::Digest;

    use super::*;

    #[test]
    fn canaries_are_as_many_as_they_should_be_and_stay_so() {
        let commit = CommitId::new(Digest::new([3; 32]));
        let of = |percent| (0..10_000).filter(|n: &u32| is_canary(&n.to_string(), commit, percent)).collect::<Vec<_>>();
        assert!(of(0).is_empty());
        assert_eq!(of(100).len(), 10_000);
        let (ten, twenty) = (of(10), of(20));
        assert!((900..1100).contains(&ten.len()), "{}", ten.len());
        assert!(ten.iter().all(|who| twenty.contains(who)));
        let other = CommitId::new(Digest::new([4; 32]));
        assert!(ten.iter().any(|who| !is_canary(&who.to_string(), other, 10)));
    }
}
