//! The side that asks.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Read},
    sync::atomic::{AtomicU64, Ordering},
};

use qvd_core::{Digest, FlavourName, Tag};
use zstd::stream::read::Decoder;

use super::{Channel, DIFFERENCE, GIVEN, OBJECTS_MAX, Question, REFUSED, Refusal, WHOLE, WINDOW_LOG_MAX};
use crate::{
    Error,
    repository::{COMMIT_MAX_BYTES, CommitId, ObjectId, Signatures, Source, TREE_MAX_BYTES, Tree, TreeId},
};

/// Largest list of flavours or tags that is read, in bytes.
const LIST_MAX_BYTES: u64 = 16 << 20;

/// A repository that is elsewhere.
pub struct Remote<C> {
    name: String,
    channel: C,
    bytes: AtomicU64,
}

impl<C: Channel> Remote<C> {
    /// Asks over a channel; `name` is what errors call the other side.
    pub fn new(name: impl Into<String>, channel: C) -> Self {
        Self { name: name.into(), channel, bytes: AtomicU64::new(0) }
    }

    /// Asks, and passes what is given to `read`.
    fn ask<T>(&self, question: &Question, read: impl FnOnce(&mut dyn Read) -> io::Result<T>) -> Result<T, Error> {
        let failed = Error::io("get from", &self.name);
        let ask = || {
            let answer = self.channel.ask(&question.encode()?)?;
            let mut answer = Counted { from: answer, bytes: &self.bytes };
            let mut first = [0];
            answer.read_exact(&mut first)?;
            match first {
                [GIVEN] => read(&mut answer).map(Ok),
                [REFUSED] => {
                    let refusal: Refusal = serde_json::from_slice(&all(&mut answer, LIST_MAX_BYTES)?)?;
                    Ok(Err(refusal.reason))
                }
                _ => Err(lie("the answer is of a kind that is unknown here")),
            }
        };
        match ask() {
            Ok(Ok(given)) => Ok(given),
            Ok(Err(reason)) => Err(failed(io::Error::other(reason))),
            Err(error) => Err(failed(error)),
        }
    }
}

impl<C> fmt::Debug for Remote<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<C: Channel> Source for Remote<C> {
    fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        self.ask(&Question::Flavours, |from| Ok(serde_json::from_slice(&all(from, LIST_MAX_BYTES)?)?))
    }

    fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error> {
        let question = Question::Tags(flavour.clone());
        self.ask(&question, |from| Ok(serde_json::from_slice(&all(from, LIST_MAX_BYTES)?)?))
    }

    fn commit(&self, id: CommitId) -> Result<Vec<u8>, Error> {
        self.ask(&Question::Commit(id), |from| all(from, COMMIT_MAX_BYTES))
    }

    fn signatures(&self, commits: &[CommitId]) -> Result<Signatures, Error> {
        let mut found = Signatures::new();
        for some in commits.chunks(OBJECTS_MAX) {
            let question = Question::Signatures(some.to_vec());
            found.append(
                &mut self
                    .ask(&question, |from| Ok(serde_json::from_slice::<Signatures>(&all(from, LIST_MAX_BYTES)?)?))?,
            );
        }
        Ok(found)
    }

    fn tree(&self, id: TreeId, like: Option<&Tree>) -> Result<Vec<u8>, Error> {
        let like = like.map(Tree::encode);
        let question = Question::Tree { id, like: like.as_ref().map(|(id, _)| *id) };
        self.ask(&question, |from| {
            let mut kind = [0];
            from.read_exact(&mut kind)?;
            let from = io::BufReader::new(from);
            match (kind, &like) {
                ([WHOLE], _) => all(&mut decoder(Decoder::with_buffer(from)?)?, TREE_MAX_BYTES),
                ([DIFFERENCE], Some((_, like))) => {
                    all(&mut decoder(Decoder::with_ref_prefix(from, like)?)?, TREE_MAX_BYTES)
                }
                _ => Err(lie("the tree is sent in a way that was not asked for")),
            }
        })
    }

    fn objects(
        &self,
        ids: &[ObjectId],
        take: &mut dyn FnMut(ObjectId, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), Error> {
        self.ask(&Question::Objects(ids.to_vec()), |from| {
            let mut from = decoder(Decoder::with_buffer(io::BufReader::new(from))?)?;
            loop {
                let (mut id, mut len) = ([0; 32], [0; 8]);
                from.read_exact(&mut id)?;
                from.read_exact(&mut len)?;
                if id == [0; 32] {
                    return Ok(());
                }
                let mut content = (&mut from).take(u64::from_le_bytes(len));
                take(ObjectId::new(Digest::new(id)), &mut content)?;
                if content.limit() > 0 {
                    return Err(lie("a content ends before its end, or is longer than its image says"));
                }
            }
        })
    }

    fn received_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Bounds what a frame may ask for.
fn decoder<R: io::BufRead>(mut decoder: Decoder<'_, R>) -> io::Result<Decoder<'_, R>> {
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(decoder.single_frame())
}

fn all(from: &mut dyn Read, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(lie(format!("the answer has more than {max} bytes")));
    }
    Ok(bytes)
}

fn lie(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

struct Counted<'a, R> {
    from: R,
    bytes: &'a AtomicU64,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(to)?;
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}
