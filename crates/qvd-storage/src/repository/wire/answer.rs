//! The side that has a repository.

use std::{
    fs::{self, File},
    io::{self, Write},
};

use zstd::stream::write::Encoder;

use super::{DIFFERENCE, GIVEN, Question, REFUSED, Refusal, WHOLE, WINDOW_LOG_MAX};
use crate::{
    Error,
    repository::{ObjectId, Repository, Signatures, TreeId},
};

/// Up to this many bytes the better compression takes no time that anybody
/// notices; what is longer would wait for it.
const SMALL_BYTES: u64 = 4 << 20;
const LEVEL_SMALL: i32 = 9;
const LEVEL_LARGE: i32 = 3;

/// Answers a question about `repository`. The question may be hostile: it is
/// bounded, and nothing but what is under a digest or a tag is given.
///
/// # Errors
/// The asker has gone, or something can no longer be read after the answer has
/// begun: then the answer is cut off, which the asker notices. What cannot be
/// answered at all is told as an answer and is no error.
pub fn answer(repository: &Repository, question: &[u8], to: &mut dyn Write) -> io::Result<()> {
    let prepared = match Question::decode(question) {
        Ok(question) => prepare(repository, question).map_err(|error| qvd_core::causes(&error).join(": ")),
        Err(reason) => Err(reason),
    };
    match prepared {
        Ok(prepared) => {
            to.write_all(&[GIVEN])?;
            prepared.write(repository, to)?;
        }
        Err(reason) => {
            to.write_all(&[REFUSED])?;
            to.write_all(&serde_json::to_vec(&Refusal { reason })?)?;
        }
    }
    to.flush()
}

/// What will be answered: all that can be refused is behind it.
enum Prepared {
    Bytes(Vec<u8>),
    Tree { bytes: Vec<u8>, like: Option<Vec<u8>> },
    Objects { ids: Vec<ObjectId>, bytes: u64 },
}

fn prepare(repository: &Repository, question: Question) -> Result<Prepared, Error> {
    let json = |bytes: serde_json::Result<Vec<u8>>| {
        bytes.map(Prepared::Bytes).map_err(|error| Error::io("answer from", repository.dir())(io::Error::from(error)))
    };
    match question {
        Question::Flavours => json(serde_json::to_vec(&repository.flavours()?)),
        Question::Tags(flavour) => json(serde_json::to_vec(&repository.tags(&flavour)?)),
        Question::Signatures(commits) => {
            let mut found = Signatures::new();
            for id in commits {
                let signatures = repository.signatures(id)?;
                if !signatures.is_empty() {
                    found.insert(id, signatures);
                }
            }
            json(serde_json::to_vec(&found))
        }
        Question::Commit(id) => repository.commit_bytes(id).map(Prepared::Bytes),
        Question::Tree { id, like } => {
            let bytes = tree(repository, id)?;
            // A tree that is not here is as good as none.
            let like = like.and_then(|like| tree(repository, like).ok());
            let like = like.filter(|like| window_log(&bytes, like) <= WINDOW_LOG_MAX);
            Ok(Prepared::Tree { bytes, like })
        }
        Question::Objects(ids) => {
            let mut bytes = 0;
            for id in &ids {
                bytes += repository.object(*id)?.metadata().map_or(0, |meta| meta.len());
            }
            Ok(Prepared::Objects { ids, bytes })
        }
    }
}

impl Prepared {
    fn write(self, repository: &Repository, to: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => to.write_all(&bytes),
            Self::Tree { bytes, like: None } => {
                to.write_all(&[WHOLE])?;
                let mut encoder = encoder(to, bytes.len() as u64)?;
                encoder.write_all(&bytes)?;
                encoder.finish().map(drop)
            }
            Self::Tree { bytes, like: Some(like) } => {
                to.write_all(&[DIFFERENCE])?;
                let mut encoder = Encoder::with_ref_prefix(to, LEVEL_LARGE, &like)?;
                encoder.long_distance_matching(true)?;
                encoder.window_log(window_log(&bytes, &like))?;
                encoder.write_all(&bytes)?;
                encoder.finish().map(drop)
            }
            Self::Objects { ids, bytes } => {
                let mut encoder = encoder(to, bytes)?;
                for id in ids {
                    let file = File::open(repository.objects.path(id))?;
                    let len = file.metadata()?.len();
                    encoder.write_all(id.digest().bytes())?;
                    encoder.write_all(&len.to_le_bytes())?;
                    io::copy(&mut io::Read::take(file, len), &mut encoder)?;
                }
                encoder.write_all(&[0; 40])?;
                encoder.finish().map(drop)
            }
        }
    }
}

fn encoder(to: &mut dyn Write, bytes: u64) -> io::Result<Encoder<'static, &mut dyn Write>> {
    Encoder::new(to, if bytes <= SMALL_BYTES { LEVEL_SMALL } else { LEVEL_LARGE })
}

fn tree(repository: &Repository, id: TreeId) -> Result<Vec<u8>, Error> {
    let path = repository.tree_path(id);
    fs::read(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::DamagedPart { what: format!("tree {id}"), reason: "it is missing".to_owned() }
        }
        _ => Error::io("read", &path)(error),
    })
}

/// The window that reaches from the end of one back to the start of the other.
fn window_log(bytes: &[u8], like: &[u8]) -> u32 {
    // Source: `ZSTD_WINDOWLOG_MIN` of zstd is 10.
    (bytes.len() + like.len()).next_power_of_two().trailing_zeros().max(10)
}
