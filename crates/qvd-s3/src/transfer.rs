//! A store as what repositories get things from and bring things to.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Read, Write},
    str::FromStr,
    sync::atomic::Ordering,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{
    GetResult, ObjectStore, ObjectStoreExt, PutMode, PutPayload, UpdateVersion,
    list::{PaginatedListOptions, PaginatedListStore},
    path::Path,
};
use qvd_core::{FlavourName, Tag};
use qvd_storage::{
    Error,
    repository::{
        COMMIT_MAX_BYTES, CommitId, Destination, Expect, Move, ObjectId, Signatures, Source, Tree, TreeId, Wanted,
    },
};
use zstd::stream::{read::Decoder, write::Encoder};

use crate::{Store, store::Versioned};

/// How many requests are under way at once for small things.
const AT_ONCE: usize = 32;
/// Contents up to this many bytes, compressed, are fetched many at once; of
/// what is longer one is read at a time, as it arrives.
const SMALL_BYTES: u64 = 256 << 10;
/// Most answers that a list of names may have; each has up to a thousand.
const PAGES_MAX: usize = 100;
/// Largest list and largest move of a tag that are read, in bytes.
const LIST_MAX_BYTES: u64 = 1 << 20;
/// Largest tree that is read, in bytes: as compressed, and as it is.
const TREE_MAX_BYTES: u64 = 1 << 30;
/// Up to this many bytes the better compression takes no time that anybody notices.
const LEVEL_SMALL_BYTES: u64 = 4 << 20;
const LEVEL_SMALL: i32 = 9;
const LEVEL_LARGE: i32 = 3;
/// Largest window of a frame, as a power of two of bytes.
const WINDOW_LOG_MAX: u32 = 27;

/// A content on its way.
enum Found {
    Small(Vec<u8>),
    Large(GetResult),
}

impl Store {
    fn object_key(&self, id: ObjectId) -> Path {
        let hex = id.hex();
        let (first, rest) = hex.split_at(2);
        self.at(&["objects", first, rest])
    }

    fn tag_key(&self, flavour: &FlavourName, tag: &Tag) -> Path {
        self.at(&["flavours", flavour.as_str(), "tags", tag.as_str()])
    }

    fn signatures_key(&self, id: CommitId) -> Path {
        self.at(&["signatures", &id.hex()])
    }

    /// The last names below a path: of what is there, and of what more is below.
    fn names<T: FromStr>(&self, below: &Path) -> Result<Vec<T>, Error> {
        let (list, whole) = self.list(below, true, PAGES_MAX)?;
        if !whole {
            let what = format!("what is below `{below}` in `{}`", self.name);
            return Err(Error::DamagedPart { what, reason: format!("it has more than {PAGES_MAX} pages of names") });
        }
        // A name that cannot be one is somebody else's.
        Ok(list.iter().filter_map(|path| path.filename()?.parse().ok()).collect())
    }

    /// What is below a path, or directly below it, and whether that is all: no more
    /// than so many answers are asked for, for a store may go on for ever.
    fn list(&self, below: &Path, directly: bool, pages: usize) -> Result<(Vec<Path>, bool), Error> {
        let prefix = format!("{below}/");
        let mut all = Vec::new();
        let delimiter = directly.then(|| "/".into());
        let mut options = PaginatedListOptions { delimiter, ..PaginatedListOptions::default() };
        for _ in 0..pages {
            let page = self.wait(self.client().list_paginated(Some(&prefix), options.clone()));
            let page = page.map_err(|error| self.failed("list", below, error))?;
            all.extend(page.result.common_prefixes);
            all.extend(page.result.objects.into_iter().map(|object| object.location));
            options.page_token = page.page_token;
            if options.page_token.is_none() {
                return Ok((all, true));
            }
        }
        Ok((all, false))
    }

    fn tag(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<Versioned<Option<CommitId>>>, Error> {
        let Some((bytes, version)) = self.get(&self.tag_key(flavour, tag), LIST_MAX_BYTES)? else { return Ok(None) };
        match serde_json::from_slice::<Move>(&bytes) {
            Ok(last) => Ok(Some((last.to, version))),
            Err(error) => Err(Error::DamagedPart {
                what: format!("tag `{tag}` of flavour {flavour} in `{}`", self.name),
                reason: error.to_string(),
            }),
        }
    }

    async fn find(&self, id: ObjectId) -> (ObjectId, object_store::Result<Found>) {
        let find = async {
            let found = self.client().get(&self.object_key(id)).await?;
            if found.meta.size > SMALL_BYTES {
                return Ok(Found::Large(found));
            }
            let bytes = found.bytes().await?;
            self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            Ok(Found::Small(bytes.into()))
        };
        (id, find.await)
    }

    fn missing_part(&self, what: String) -> Error {
        Error::DamagedPart { what, reason: format!("`{}` does not have it", self.name) }
    }

    /// The texts of a commit's signatures there.
    fn signed(&self, id: CommitId) -> Result<Vec<String>, Error> {
        let key = self.signatures_key(id);
        let Some((bytes, _)) = self.get(&key, LIST_MAX_BYTES)? else { return Ok(Vec::new()) };
        serde_json::from_slice(&bytes).map_err(|error| Error::DamagedPart {
            what: format!("the signatures of commit {id} in `{}`", self.name),
            reason: error.to_string(),
        })
    }
}

impl Source for Store {
    fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        self.names(&self.at(&["flavours"]))
    }

    fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error> {
        let names: Vec<Tag> = self.names(&self.at(&["flavours", flavour.as_str(), "tags"]))?;
        let mut tags = BTreeMap::new();
        for name in names {
            if let Some((Some(to), _)) = self.tag(flavour, &name)? {
                tags.insert(name, to);
            }
        }
        Ok(tags)
    }

    fn commit(&self, id: CommitId) -> Result<Vec<u8>, Error> {
        let found = self.get(&self.at(&["commits", &id.hex()]), COMMIT_MAX_BYTES)?;
        found.map(|(bytes, _)| bytes).ok_or_else(|| self.missing_part(format!("commit {id}")))
    }

    fn signatures(&self, commits: &[CommitId]) -> Result<Signatures, Error> {
        let all = commits.iter().map(|id| Ok((*id, self.signed(*id)?)));
        all.collect::<Result<Signatures, Error>>().map(|mut all| {
            all.retain(|_, texts| !texts.is_empty());
            all
        })
    }

    fn tree(&self, id: TreeId, _like: Option<&Tree>) -> Result<Vec<u8>, Error> {
        let found = self.get(&self.at(&["trees", &id.hex()]), TREE_MAX_BYTES)?;
        let (packed, _) = found.ok_or_else(|| self.missing_part(format!("tree {id}")))?;
        let mut bytes = Vec::new();
        let read = decoder(packed.as_slice()).and_then(|from| from.take(TREE_MAX_BYTES + 1).read_to_end(&mut bytes));
        let reason = match read {
            Ok(len) if len as u64 <= TREE_MAX_BYTES => return Ok(bytes),
            Ok(_) => format!("it has more than {TREE_MAX_BYTES} bytes"),
            Err(error) => error.to_string(),
        };
        Err(Error::DamagedPart { what: format!("tree {id} in `{}`", self.name), reason })
    }

    fn objects(
        &self,
        ids: &[ObjectId],
        take: &mut dyn FnMut(ObjectId, &mut dyn Read) -> io::Result<()>,
    ) -> Result<(), Error> {
        let mut arriving = stream::iter(ids.iter().map(|id| self.find(*id))).buffer_unordered(AT_ONCE / 4);
        while let Some((id, found)) = self.wait(arriving.next()) {
            let key = self.object_key(id);
            let taken = match found {
                Ok(Found::Small(packed)) => decoder(packed.as_slice()).and_then(|mut from| take(id, &mut from)),
                Ok(Found::Large(found)) => {
                    let body = io::BufReader::new(self.body(found));
                    decoder(body).and_then(|mut from| take(id, &mut from))
                }
                Err(object_store::Error::NotFound { .. }) => return Err(self.missing_part(format!("object {id}"))),
                Err(error) => return Err(self.failed("get", &key, error)),
            };
            taken.map_err(|source| Error::Io {
                op: "take what is in",
                path: format!("{}/objects/{}", self.name, id.hex()).into(),
                source,
            })?;
        }
        Ok(())
    }

    fn received_bytes(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Destination for Store {
    fn has_commit(&self, id: CommitId) -> Result<bool, Error> {
        self.has(&self.at(&["commits", &id.hex()]))
    }

    fn missing(&self, ids: &[ObjectId]) -> Result<HashSet<ObjectId>, Error> {
        let below = self.at(&["objects"]);
        // One request tells of a thousand: as long as that is less than to ask
        // for each, and so costs what the change costs, not what is there.
        let (known, all_listed) = self.list(&below, false, ids.len() / 1000 + 2)?;
        let known: HashSet<Path> = known.into_iter().collect();
        let (mut missing, mut unsure) = (HashSet::new(), Vec::new());
        for id in ids {
            match (known.contains(&self.object_key(*id)), all_listed) {
                (true, _) => {}
                (false, true) => drop(missing.insert(*id)),
                (false, false) => unsure.push(*id),
            }
        }
        let ask = |id: ObjectId| async move {
            let key = self.object_key(id);
            match self.client().head(&key).await {
                Ok(_) => Ok(None),
                Err(object_store::Error::NotFound { .. }) => Ok(Some(id)),
                Err(error) => Err(self.failed("look for", &key, error)),
            }
        };
        let asked = stream::iter(unsure.into_iter().map(ask)).buffer_unordered(AT_ONCE);
        let asked: Vec<Option<ObjectId>> = self.wait(asked.try_collect())?;
        missing.extend(asked.into_iter().flatten());
        Ok(missing)
    }

    fn put_object(&self, id: ObjectId, content: File) -> Result<(), Error> {
        let key = self.object_key(id);
        let failed =
            |source| Error::Io { op: "bring", path: format!("{}/objects/{}", self.name, id.hex()).into(), source };
        let len = content.metadata().map_err(failed)?.len();
        let packed = pack(self.upload(&key), &mut content.take(len), len).map_err(failed)?;
        packed.finish()
    }

    fn put_tree(&self, id: TreeId, bytes: &[u8]) -> Result<(), Error> {
        let key = self.at(&["trees", &id.hex()]);
        if self.has(&key)? {
            return Ok(());
        }
        let mut from = bytes;
        let packed = pack(self.upload(&key), &mut from, bytes.len() as u64);
        packed.map_err(|source| Error::Io { op: "bring", path: key.to_string().into(), source })?.finish()
    }

    fn put_commit(&self, id: CommitId, bytes: &[u8]) -> Result<(), Error> {
        self.put(&self.at(&["commits", &id.hex()]), bytes.to_vec())
    }

    fn put_signatures(&self, id: CommitId, texts: &[String]) -> Result<(), Error> {
        let mut all = self.signed(id)?;
        let known = all.len();
        all.extend(texts.iter().filter(|text| !all.contains(text)).cloned().collect::<Vec<_>>());
        if all.len() == known {
            return Ok(());
        }
        let key = self.signatures_key(id);
        let json = serde_json::to_vec(&all).map_err(|error| Error::Io {
            op: "write",
            path: key.to_string().into(),
            source: error.into(),
        })?;
        self.put(&key, json)
    }

    fn move_tag(&self, wanted: &Wanted, tag: &Tag, expect: Expect, to: &Move) -> Result<(), Error> {
        let flavour = &wanted.flavour;
        let key = self.tag_key(flavour, tag);
        let moved = || Error::TagMoved { flavour: flavour.clone(), tag: tag.clone() };
        let last = self.tag(flavour, tag)?;
        if let Expect::At(expected) = expect
            && last.as_ref().and_then(|(at, _)| *at) != expected
        {
            return Err(moved());
        }
        let mode = match last.map(|(_, version)| version) {
            None => PutMode::Create,
            Some(e_tag) => PutMode::Update(UpdateVersion { e_tag, version: None }),
        };
        let json = serde_json::to_vec(to).map_err(|error| Error::Io {
            op: "write",
            path: key.to_string().into(),
            source: error.into(),
        })?;
        let put = self.wait(self.client().put_opts(&key, PutPayload::from(json.clone()), mode.into()));
        match put {
            Ok(_) => Ok(()),
            Err(object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. }) => Err(moved()),
            // Without conditions in the store, the look above is what there is.
            Err(error) if has_no_conditions(&error) => {
                tracing::warn!(store = %self.name, "it knows no conditional put: others who move the tag now may win");
                self.put(&key, json)
            }
            Err(error) => Err(self.failed("put", &key, error)),
        }
    }

    fn sent_bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Store {
    fn has(&self, key: &Path) -> Result<bool, Error> {
        match self.wait(self.client().head(key)) {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("look for", key, error)),
        }
    }
}

/// Whether a store answers that it does not know what was asked. Source: S3
/// says `NotImplemented`, status 501, to a header that it does not know.
fn has_no_conditions(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. })
        || qvd_core::causes(error).iter().any(|text| text.contains("<Code>NotImplemented</Code>"))
}

fn pack<W: Write>(to: W, from: &mut dyn Read, len: u64) -> io::Result<W> {
    let mut encoder = Encoder::new(to, if len <= LEVEL_SMALL_BYTES { LEVEL_SMALL } else { LEVEL_LARGE })?;
    // What a frame says of its content is looked at when it is read.
    encoder.include_checksum(true)?;
    if io::copy(from, &mut encoder)? != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    encoder.finish()
}

fn decoder<R: io::BufRead>(from: R) -> io::Result<Decoder<'static, R>> {
    let mut decoder = Decoder::with_buffer(from)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(decoder.single_frame())
}
