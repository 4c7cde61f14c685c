//! Commits: versions of an image, immutable, each with what it came from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qvd_core::{Digest, FlavourName};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{CommitId, DISK_BLOCK_BYTES, DISK_MAX_BYTES, ObjectId, TreeId};
use crate::ImageConfig;

/// Largest commit that is read, in bytes: a recipe, a message and little else.
pub const COMMIT_MAX_BYTES: u64 = 4 << 20;

/// One version of an image.
///
/// Its id is the SHA-256 of its canonical encoding: [`Commit::encode`]. A
/// signature stands beside a commit, not in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    format: Format,
    /// What the image holds.
    pub content: Content,
    /// What it was made from, the first the one it continues. None is a beginning.
    pub parents: Vec<CommitId>,
    /// Who made it.
    pub author: String,
    /// When, in seconds since 1970.
    pub time_unix_s: u64,
    /// Why, for people.
    pub message: String,
    /// Text of the recipe that it was built by, if any.
    pub recipe: Option<String>,
    /// Key of that recipe: what decides whether it has to be built again.
    pub recipe_key: Option<Digest>,
    /// Flavour, and what desktops of it get unless told otherwise.
    pub config: ImageConfig,
    /// The list of its packages, kept as an object; none if it was not made.
    pub packages: Option<ObjectId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    #[serde(rename = "qvd-commit-1")]
    One,
}

/// What an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
#[non_exhaustive]
pub enum Content {
    /// A file tree.
    Tree {
        /// The tree.
        id: TreeId,
        /// Files, directories, links and nodes in it, the root included.
        entries: u64,
        /// Bytes of its regular files.
        size_bytes: u64,
    },
    /// A disk, cut into blocks of one length.
    Disk {
        /// An object that lists the ids of the blocks in order, 32 bytes each;
        /// 32 zero bytes stand for a block that was never written.
        blocks: ObjectId,
        /// Length of a block in bytes.
        block_bytes: u32,
        /// Length of the disk in bytes.
        size_bytes: u64,
    },
}

impl Content {
    /// How many entries it has, and how many bytes. A disk has no entries.
    #[must_use]
    pub const fn size(&self) -> (u64, u64) {
        match self {
            Self::Tree { entries, size_bytes, .. } => (*entries, *size_bytes),
            Self::Disk { size_bytes, .. } => (0, *size_bytes),
        }
    }
}

impl Commit {
    /// A commit without parents, message and recipe; fill in what there is.
    #[must_use]
    pub fn new(content: Content, config: ImageConfig, author: impl Into<String>, time: SystemTime) -> Self {
        Self {
            format: Format::One,
            content,
            parents: Vec::new(),
            author: author.into(),
            time_unix_s: time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            message: String::new(),
            recipe: None,
            recipe_key: None,
            config,
            packages: None,
        }
    }

    /// Flavour that it belongs to.
    #[must_use]
    pub const fn flavour(&self) -> &FlavourName {
        &self.config.flavour
    }

    /// When it was made.
    #[must_use]
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.time_unix_s)
    }

    /// Its canonical encoding and the id that this gives.
    ///
    /// # Errors
    /// It cannot be written as JSON, which no commit is known to do.
    pub fn encode(&self) -> Result<(CommitId, Vec<u8>), serde_json::Error> {
        // The order of fields is that of the type; maps are sorted.
        let bytes = serde_json::to_vec(self)?;
        Ok((Self::id_of(&bytes), bytes))
    }

    /// The id of an encoded commit, whatever the bytes are.
    #[must_use]
    pub fn id_of(bytes: &[u8]) -> CommitId {
        CommitId::new(Digest::new(Sha256::digest(bytes).into()))
    }

    /// Reads a commit and its id from its encoding. Fields that came later than
    /// the commit have their defaults.
    ///
    /// # Errors
    /// Why the bytes are no commit, in one line.
    pub fn decode(bytes: &[u8]) -> Result<(CommitId, Self), String> {
        if bytes.len() as u64 > COMMIT_MAX_BYTES {
            return Err(format!("it has {} bytes, more than {COMMIT_MAX_BYTES}", bytes.len()));
        }
        let commit: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if let Content::Disk { block_bytes, size_bytes, .. } = commit.content
            && (block_bytes != DISK_BLOCK_BYTES || !(1..=DISK_MAX_BYTES).contains(&size_bytes))
        {
            return Err(format!("its disk of {size_bytes} bytes in blocks of {block_bytes} cannot be kept"));
        }
        Ok((Self::id_of(bytes), commit))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn commit() -> Commit {
        let tree = TreeId::new(Digest::new([7; 32]));
        let config = ImageConfig::plain("tiny".parse().unwrap());
        Commit::new(Content::Tree { id: tree, entries: 1, size_bytes: 0 }, config, "me", UNIX_EPOCH)
    }

    #[test]
    fn an_encoding_is_read_back_and_no_flipped_bit_goes_unseen() {
        let (id, bytes) = commit().encode().unwrap();
        assert_eq!(Commit::decode(&bytes).unwrap(), (id, commit()));
        let text = String::from_utf8(bytes.clone()).unwrap();
        for other in [
            text.replace("qvd-commit-1", "qvd-commit-2"),
            text.replace("\"author\"", "\"more\":1,\"author\""),
            text.replace("sha256:07", "sha256:../"),
        ] {
            assert!(Commit::decode(other.as_bytes()).is_err(), "{other}");
        }
        for n in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[n / 8] ^= 1 << (n % 8);
            assert!(Commit::decode(&flipped).map_or(true, |(other, _)| other != id), "bit {n}");
        }
    }

    #[test]
    fn every_field_counts() {
        let changes: [fn(&mut Commit); 6] = [
            |c| c.author = "you".to_owned(),
            |c| c.time_unix_s = 1,
            |c| c.message = "why".to_owned(),
            |c| c.parents.push(CommitId::new(Digest::new([1; 32]))),
            |c| c.recipe = Some(String::new()),
            |c| c.packages = Some(ObjectId::new(Digest::new([2; 32]))),
        ];
        let mut ids = vec![commit().encode().unwrap().0];
        for change in changes {
            let mut other = commit();
            change(&mut other);
            let id = other.encode().unwrap().0;
            assert!(!ids.contains(&id));
            ids.push(id);
        }
    }
}
