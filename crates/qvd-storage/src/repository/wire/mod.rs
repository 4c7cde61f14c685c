//! What travels between repositories: a question of one line, an answer that
//! is a stream of bytes, compressed.
//!
//! Whatever carries bytes can be a [`Channel`]: a connection to another host,
//! or a pipe to a thread of this process. Neither side trusts the other.
//!
//! An answer begins with one byte. `0`: what was asked for follows. `1`: an
//! [`Refusal`] in JSON follows. Lists, signatures (JSON) and commits follow as they
//! are; a tree and contents as below.
//!
//! - A tree is one byte, then a zstd frame of its encoding. The byte is `1` if
//!   the frame refers to the encoding of the tree that the question named as
//!   known: what did not change costs next to nothing.
//! - Contents are a zstd frame of records: id (32 bytes), length (8 bytes,
//!   little-endian), content. A record whose id is zero ends them.

mod answer;
mod remote;
mod stream;

use std::{fmt, io};

use qvd_core::FlavourName;
use serde::{Deserialize, Serialize};

use super::{CommitId, ObjectId, TreeId};

pub use answer::answer;
pub use remote::Remote;
pub use stream::{Stream, Streams, Turn, give, receive, serve};

/// Longest question in bytes: it names at most [`OBJECTS_MAX`] contents.
pub const QUESTION_MAX_BYTES: u64 = 1 << 17;
/// Most contents or signatures that one question may ask for.
pub const OBJECTS_MAX: usize = 1024;
/// Largest window of a frame, as a power of two of bytes: what a receiver has
/// to have in memory. 128 MiB.
const WINDOW_LOG_MAX: u32 = 27;

const GIVEN: u8 = 0;
const REFUSED: u8 = 1;
const WHOLE: u8 = 0;
const DIFFERENCE: u8 = 1;

/// What can be asked of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Question {
    /// Every flavour.
    Flavours,
    /// The tags of a flavour and where they are.
    Tags(FlavourName),
    /// The encoding of a commit.
    Commit(CommitId),
    /// The signatures of commits.
    Signatures(Vec<CommitId>),
    /// The encoding of a tree.
    Tree {
        /// Tree that is asked for.
        id: TreeId,
        /// Tree that the asker has, if it is likely to be similar.
        like: Option<TreeId>,
    },
    /// Contents.
    Objects(Vec<ObjectId>),
}

impl Question {
    /// The line that asks it.
    ///
    /// # Errors
    /// It cannot be written as JSON, which no question is known to do.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Reads a question.
    ///
    /// # Errors
    /// Why it is none, in one line.
    pub fn decode(line: &[u8]) -> Result<Self, String> {
        if line.len() as u64 > QUESTION_MAX_BYTES {
            return Err(format!("a question has {} bytes, more than {QUESTION_MAX_BYTES}", line.len()));
        }
        let question: Self = serde_json::from_slice(line).map_err(|error| format!("not a question: {error}"))?;
        match &question {
            Self::Objects(ids) if ids.len() > OBJECTS_MAX => Err(too_many(ids.len())),
            Self::Signatures(ids) if ids.len() > OBJECTS_MAX => Err(too_many(ids.len())),
            _ => Ok(question),
        }
    }
}

fn too_many(count: usize) -> String {
    format!("a question asks for {count} things, more than {OBJECTS_MAX}")
}

/// Why a question is not answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// In one line.
    pub reason: String,
}

/// A way to ask a repository that is elsewhere.
pub trait Channel: fmt::Debug + Send + Sync {
    /// Sends a question and returns the answer as it arrives. Calls may come
    /// from several threads.
    ///
    /// # Errors
    /// The other side cannot be reached.
    fn ask(&self, question: &[u8]) -> io::Result<Box<dyn io::Read + '_>>;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read_back_and_bounded() {
        let id = |n: u8| ObjectId::new(qvd_core::Digest::new([n; 32]));
        for question in [
            Question::Flavours,
            Question::Tags("icewm".parse().unwrap()),
            Question::Tree { id: TreeId::new(id(1).digest()), like: None },
            Question::Objects(vec![id(2); OBJECTS_MAX]),
        ] {
            assert_eq!(Question::decode(&question.encode().unwrap()).unwrap(), question);
        }
        let many = Question::Objects(vec![id(2); OBJECTS_MAX + 1]).encode().unwrap();
        assert!(Question::decode(&many).unwrap_err().contains("1025 things"));
        for bad in [r#"{"tags":"../x"}"#, r#"{"commit":"sha256:../../x"}"#, r#""everything""#, "", "{"] {
            Question::decode(bad.as_bytes()).unwrap_err();
        }
    }
}
