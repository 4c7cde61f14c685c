//! Flavours and their tags: names on commits, moved one step at a time.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use qvd_core::{FlavourName, Tag};
use serde::{Deserialize, Serialize};

use super::{CommitId, Repository, lock::Lock};
use crate::{Error, fsio};

/// Longest line of a reflog, in bytes: who and why are cut to fit.
const LINE_MAX_BYTES: u64 = 16 << 10;
const TEXT_MAX_CHARS: usize = 1000;

/// One move of a tag: the newest is the tag itself, all are its reflog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// Where it was; nowhere before it was made.
    pub from: Option<CommitId>,
    /// Where it is now; nowhere once it is removed.
    pub to: Option<CommitId>,
    /// When, in seconds since 1970.
    pub time_unix_s: u64,
    /// Who moved it.
    pub who: String,
    /// And why.
    pub why: String,
}

/// Where a tag has to be for a move to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)] // there is no third way
pub enum Expect {
    /// Anywhere.
    Anything,
    /// Here, or nowhere: else somebody else moved it.
    At(Option<CommitId>),
}

impl Repository {
    /// Every flavour that has a tag, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn flavours(&self) -> Result<Vec<FlavourName>, Error> {
        let mut found = self.all_flavours()?;
        found.retain(|flavour| !matches!(self.tag_names(flavour), Ok(tags) if tags.is_empty()));
        found.sort();
        Ok(found)
    }

    /// Every flavour, those that have nothing left but a past included.
    pub(crate) fn all_flavours(&self) -> Result<Vec<FlavourName>, Error> {
        names(&self.flavours_dir())
    }

    /// The names of a flavour's tags, whatever they are on.
    pub(crate) fn tag_names(&self, flavour: &FlavourName) -> Result<Vec<Tag>, Error> {
        names(&self.tags_dir(flavour))
    }

    /// The tags of a flavour and where they are; none if there is no such flavour.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn tags(&self, flavour: &FlavourName) -> Result<BTreeMap<Tag, CommitId>, Error> {
        let mut found = BTreeMap::new();
        for tag in self.tag_names(flavour)? {
            if let Some(commit) = self.tagged(flavour, &tag)? {
                found.insert(tag, commit);
            }
        }
        Ok(found)
    }

    /// The commit that a tag is on, if there is such a tag.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn tagged(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<CommitId>, Error> {
        Ok(self.last_move(flavour, tag)?.and_then(|last| last.to))
    }

    /// Moves a tag, makes it, or with `to` none removes it, and records who did
    /// it and why. Of several who move it at once, all but one meet `expect`.
    ///
    /// # Errors
    /// [`Error::TagMoved`] when it is elsewhere than expected. A commit that is
    /// not there, or of another flavour, is refused.
    pub fn move_tag(
        &self,
        flavour: &FlavourName,
        tag: &Tag,
        expect: Expect,
        to: Option<CommitId>,
        by: (&str, &str),
    ) -> Result<Move, Error> {
        // What the tag is put on must not be collected before it is.
        let _keep = Lock::shared(&self.lock_path())?;
        if let Some(to) = to {
            let other = self.commit(to)?.config.flavour;
            if other != *flavour {
                return Err(Error::Refused(format!("commit {to} is of flavour {other}, not of {flavour}")));
            }
        }
        let dir = self.flavour_dir(flavour);
        for dir in [&dir, &dir.join("tags"), &dir.join("reflog")] {
            fsio::ensure_private_dir(dir).map_err(Error::io("use", dir))?;
        }
        fsio::sync_dir(&self.flavours_dir()).map_err(Error::io("write", &dir))?;
        let _one_at_a_time = Lock::alone(&dir.join("lock"))?;
        let last = self.last_move(flavour, tag)?;
        let from = last.as_ref().and_then(|last| last.to);
        if matches!(expect, Expect::At(expected) if expected != from) {
            return Err(Error::TagMoved { flavour: flavour.clone(), tag: tag.clone() });
        }
        // A move that was cut off before it got into the reflog gets there now.
        if let Some(last) = &last {
            self.record(flavour, tag, last)?;
        }
        let time_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let cut = |text: &str| text.chars().take(TEXT_MAX_CHARS).collect();
        let next = Move { from, to, time_unix_s, who: cut(by.0), why: cut(by.1) };
        let path = self.tag_path(flavour, tag);
        if from != to {
            let json = serde_json::to_vec(&next).map_err(io::Error::from);
            json.and_then(|json| fsio::replace(&path, &json)).map_err(Error::io("write", &path))?;
            self.record(flavour, tag, &next)?;
            self.end_rollout(flavour, tag, to)?;
        }
        if to.is_none() {
            remove(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(next)
    }

    /// Where a tag has been, the newest move last.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn reflog(&self, flavour: &FlavourName, tag: &Tag) -> Result<Vec<Move>, Error> {
        let path = self.reflog_path(flavour, tag);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            text => text.map_err(Error::io("read", &path))?,
        };
        // A line that was cut off by a crash is no move, and need not even be text.
        let lines = text.split(|byte| *byte == b'\n');
        let mut moves: Vec<Move> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        if let Some(last) = self.last_move(flavour, tag)?
            && moves.last() != Some(&last)
        {
            moves.push(last);
        }
        Ok(moves)
    }

    /// Every tag that has a reflog, those that were removed included.
    pub(crate) fn logged_tags(&self, flavour: &FlavourName) -> Result<Vec<Tag>, Error> {
        names(&self.flavour_dir(flavour).join("reflog"))
    }

    fn last_move(&self, flavour: &FlavourName, tag: &Tag) -> Result<Option<Move>, Error> {
        let path = self.tag_path(flavour, tag);
        let damaged = |reason: String| Error::DamagedPart { what: format!("tag `{tag}` of flavour {flavour}"), reason };
        match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|e| damaged(e.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    /// Appends a move to the reflog unless it is the last there.
    fn record(&self, flavour: &FlavourName, tag: &Tag, one: &Move) -> Result<(), Error> {
        let path = self.reflog_path(flavour, tag);
        let mut line = serde_json::to_vec(one).map_err(|e| Error::io("write", &path)(io::Error::from(e)))?;
        line.push(b'\n');
        let append = || {
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            let (end, last) = last_line(&mut file)?;
            if last == line {
                return Ok(());
            }
            // Half a line after a crash goes.
            file.set_len(end)?;
            file.seek(SeekFrom::Start(end))?;
            file.write_all(&line)?;
            file.sync_all()?;
            path.parent().map_or(Ok(()), fsio::sync_dir)
        };
        append().map_err(Error::io("write", &path))
    }

    pub(crate) fn flavours_dir(&self) -> PathBuf {
        self.dir().join("flavours")
    }

    pub(crate) fn flavour_dir(&self, flavour: &FlavourName) -> PathBuf {
        self.flavours_dir().join(flavour.as_str())
    }

    fn tags_dir(&self, flavour: &FlavourName) -> PathBuf {
        self.flavour_dir(flavour).join("tags")
    }

    pub(crate) fn tag_path(&self, flavour: &FlavourName, tag: &Tag) -> PathBuf {
        self.tags_dir(flavour).join(tag.as_str())
    }

    fn reflog_path(&self, flavour: &FlavourName, tag: &Tag) -> PathBuf {
        self.flavour_dir(flavour).join("reflog").join(tag.as_str())
    }
}

/// Where the last whole line of a file ends, and the line. Reads the end only:
/// the cost of a move does not grow with their number.
fn last_line(file: &mut File) -> io::Result<(u64, Vec<u8>)> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(2 * LINE_MAX_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(2 * LINE_MAX_BYTES).read_to_end(&mut tail)?;
    let Some(newline) = tail.iter().rposition(|byte| *byte == b'\n') else { return Ok((start, Vec::new())) };
    tail.truncate(newline + 1);
    let end = start + tail.len() as u64;
    let before = tail.get(..newline).and_then(|tail| tail.iter().rposition(|byte| *byte == b'\n'));
    Ok((end, tail.split_off(before.map_or(0, |at| at + 1))))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    path.parent().map_or(Ok(()), fsio::sync_dir)
}

/// The names in a directory that are names of this kind; none if it is not there.
fn names<T: std::str::FromStr>(dir: &Path) -> Result<Vec<T>, Error> {
    let read = || match fs::read_dir(dir) {
        Ok(entries) => {
            entries.map(|entry| Ok(entry?.file_name().to_str().and_then(|name| name.parse().ok()))).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let names: io::Result<Vec<Option<T>>> = read();
    Ok(names.map_err(Error::io("read", dir))?.into_iter().flatten().collect())
}
