//! How people name commits: `icewm`, `icewm:default`, `icewm@1f0c…`.

use std::{fmt, str::FromStr};

use qvd_core::{FlavourName, IdError, Tag};
use serde::{Deserialize, Serialize};

use super::{CommitId, Repository};
use crate::Error;

/// Fewest digits of an id that are taken for one.
const PREFIX_MIN_LEN: usize = 4;

/// A commit as a person names it: `FLAVOUR`, `FLAVOUR:TAG` or `FLAVOUR@ID`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Flavour that it is of.
    pub flavour: FlavourName,
    /// Which of its commits; none is where `head` is, or else `default`, or the
    /// flavour's only tag.
    pub revision: Option<Revision>,
}

/// Which of a flavour's commits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Revision {
    /// The one that a tag is on.
    Tag(Tag),
    /// The one whose id begins with these hexadecimal digits.
    Id(String),
}

/// Why a text names no commit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The flavour or the tag is no name.
    #[error(transparent)]
    Name(#[from] IdError),
    /// The id is none.
    #[error("`{0}` is no id of a commit: give at least {PREFIX_MIN_LEN} of its hexadecimal digits")]
    Id(String),
}

impl FromStr for Reference {
    type Err = ReferenceError;
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if let Some((flavour, id)) = text.split_once('@') {
            let digits = id.strip_prefix("sha256:").unwrap_or(id).to_ascii_lowercase();
            if !(PREFIX_MIN_LEN..=64).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(ReferenceError::Id(id.to_owned()));
            }
            return Ok(Self { flavour: flavour.parse()?, revision: Some(Revision::Id(digits)) });
        }
        match text.split_once(':') {
            Some((flavour, tag)) => Ok(Self { flavour: flavour.parse()?, revision: Some(Revision::Tag(tag.parse()?)) }),
            None => Ok(Self { flavour: text.parse()?, revision: None }),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            None => write!(f, "{}", self.flavour),
            Some(Revision::Tag(tag)) => write!(f, "{}:{tag}", self.flavour),
            Some(Revision::Id(id)) => write!(f, "{}@{id}", self.flavour),
        }
    }
}

impl Serialize for Reference {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Repository {
    /// The commit that a person named.
    ///
    /// # Errors
    /// [`Error::NoSuchFlavour`], [`Error::NoSuchTag`], or no commit of the
    /// flavour has an id that begins so, or several do.
    pub fn resolve(&self, reference: &Reference) -> Result<CommitId, Error> {
        let flavour = &reference.flavour;
        let tag = match &reference.revision {
            Some(Revision::Id(digits)) => return self.by_prefix(flavour, digits),
            Some(Revision::Tag(tag)) => tag.clone(),
            None => Tag::head(),
        };
        if let Some(commit) = self.tagged(flavour, &tag)? {
            return Ok(commit);
        }
        if reference.revision.is_none() {
            // Whoever pulled one tag has no `head`.
            let tags = self.tags(flavour)?;
            let only = tags.values().next().filter(|_| tags.len() == 1);
            if let Some(commit) = tags.get(&Tag::default_tag()).or(only) {
                return Ok(*commit);
            }
        }
        let known: Vec<String> = self.tags(flavour)?.keys().map(|tag| format!("`{tag}`")).collect();
        if known.is_empty() {
            return Err(Error::NoSuchFlavour(flavour.clone()));
        }
        Err(Error::NoSuchTag { flavour: flavour.clone(), tag, known })
    }

    fn by_prefix(&self, flavour: &FlavourName, digits: &str) -> Result<CommitId, Error> {
        let mut found = match CommitId::from_hex(digits) {
            Some(id) => vec![id],
            None => self.commits()?.into_iter().filter(|id| id.hex().starts_with(digits)).collect(),
        };
        found.retain(|id| self.commit(*id).is_ok_and(|commit| commit.flavour() == flavour));
        match found.as_slice() {
            [one] => Ok(*one),
            [] => Err(Error::NoSuchCommit { flavour: flavour.clone(), digits: digits.to_owned() }),
            _ => Err(Error::Refused(format!("several commits of {flavour} have an id that begins with {digits}"))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_and_written_alike() {
        let hex = "0123456789abcdef".repeat(4);
        for text in ["icewm", "icewm:default", "icewm@01ab", &format!("icewm@{hex}")] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
        assert_eq!(format!("f@sha256:{hex}").parse::<Reference>().unwrap().to_string(), format!("f@{hex}"));
        for bad in ["", ":x", "../f", "f:", "f:../x", "f@", "f@12", "f@xyzw", "f@../../../x", &format!("f@{hex}0")] {
            bad.parse::<Reference>().unwrap_err();
        }
    }
}
