//! The next version of an image, from a root that only its own machine can read:
//! it tells what is there, and packs what is asked for. Neither is trusted.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io::{self, BufRead, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    thread,
};

use super::{
    CommitId, Entry, Node, Repository, TREE_MAX_ENTRIES, Tree,
    archive::{bad, unpack},
    capture::{Found, NewVersion, OLD_LINKS, Version, is_left_out, note_left_out},
};
use crate::Error;

/// What a shell runs inside, as root, to tell and to pack, while everybody else
/// stands still. First it tells of each file on the root's file system: kind,
/// device, length in bytes, times of change and of content, path; a record ends
/// with a zero byte, the list with an empty record. Then it reads paths, each
/// ended by a zero byte, and writes an archive of what they name.
///
/// It takes the `find` and the `tar` of GNU in the image.
pub const TELL: &str = r"exec 2>/dev/null; export LC_ALL=C; cd / || exit 9
    find . -xdev -printf '%y %D %s %C@ %T@ %P\0' && printf '\0' &&
    tar --null --no-unquote --no-recursion --format=posix --numeric-owner --xattrs --xattrs-include='*' -T - -cf -";

/// Longest record, in bytes: a path and some numbers.
const RECORD_MAX: u64 = 8 << 10;
/// All records together, in bytes: as much as names of an archive may have.
const TOLD_MAX: u64 = 256 << 20;

/// A file, as it is told of.
struct Told {
    kind: u8,
    device: u64,
    len: u64,
    changed: (i64, u64),
    modified: (i64, u64),
    path: PathBuf,
}

impl Repository {
    /// As [`Repository::capture`], of a root that tells by [`TELL`] what is in it:
    /// `told` is what that writes and `ask` what it reads, neither of which may wait for
    /// ever. No more than `max_bytes` are taken of files that are not as in `base`.
    ///
    /// # Errors
    /// As [`Repository::capture`]; also if what is told cannot be.
    pub fn capture_told(
        &self,
        base: CommitId,
        told: &mut dyn Read,
        ask: impl Write + Send,
        max_bytes: u64,
        new: &NewVersion,
    ) -> Result<Version, Error> {
        self.capture_by(base, new, |staging, before| {
            let past = Past::new(before);
            let read = |error| Error::io("read", Path::new("the machine's root"))(error);
            let mut told = io::BufReader::with_capacity(64 << 10, told);
            let mut list = told.take(TOLD_MAX);
            let mut entries = past.entries(&mut list).map_err(read)?;
            told = list.into_inner();
            let wanted = past.wanted.take();
            let asked: HashSet<&Path> = wanted.iter().map(PathBuf::as_path).collect();
            // It packs while it is asked: who only asks waits for ever.
            let packed = thread::scope(|scope| {
                let give = scope.spawn(|| give(ask, &wanted));
                let packed = unpack(staging, told.take(max_bytes));
                let given = give.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                packed.and_then(|packed| given.map(|()| packed))
            });
            // What nobody asked for is not taken.
            let given: Vec<_> = packed.map_err(read)?.into_iter().filter(|e| asked.contains(&*e.path)).collect();
            let found: HashSet<&Path> = given.iter().map(|entry| &*entry.path).collect();
            if let Some(missing) = wanted.iter().find(|path| !found.contains(&***path)) {
                let what = format!("`/{}` was asked for and not given", missing.display());
                return Err(read(bad(what)));
            }
            let files_read = given.iter().filter(|entry| matches!(entry.node, Node::File { .. })).count() as u64;
            entries.extend(given);
            Ok(Found { entries, covered: past.covered.take(), left_out: past.left_out.take(), files_read })
        })
    }
}

fn give(mut ask: impl Write, wanted: &[PathBuf]) -> io::Result<()> {
    for path in wanted {
        // A name that begins with a dash is no option.
        ask.write_all(b"./")?;
        ask.write_all(path.as_os_str().as_bytes())?;
        ask.write_all(&[0])?;
    }
    ask.flush()
}

struct Past<'a> {
    base: HashMap<&'a Path, &'a Entry>,
    wanted: RefCell<Vec<PathBuf>>,
    covered: RefCell<Vec<PathBuf>>,
    left_out: RefCell<(Vec<PathBuf>, u64)>,
}

impl<'a> Past<'a> {
    fn new(base: &'a Tree) -> Self {
        Self {
            base: base.entries().iter().map(|entry| (entry.path.as_path(), entry)).collect(),
            wanted: RefCell::default(),
            covered: RefCell::default(),
            left_out: RefCell::default(),
        }
    }

    /// What is as it was; the rest is noted as what has to be asked for.
    fn entries(&self, told: &mut impl BufRead) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut device = None;
        for number in 0.. {
            if number > TREE_MAX_ENTRIES {
                return Err(bad(format!("more than {TREE_MAX_ENTRIES} files are told of")));
            }
            let Some(told) = record(told)? else { break };
            let device = *device.get_or_insert(told.device);
            // Of files overlayfs tells the device of their layer.
            if told.kind == b'd' && told.device != device {
                self.covered.borrow_mut().push(told.path);
                continue;
            }
            let known = self.base.get(&*told.path);
            let same = known.filter(|entry| is_untouched(entry, &told));
            if is_left_out(&told.path) {
                if same.is_none() {
                    note_left_out(&mut self.left_out.borrow_mut(), &told.path);
                }
            } else if let Some(entry) = same {
                let mut entry = (*entry).clone();
                if let Node::File { link: link @ 1.., .. } = &mut entry.node {
                    *link |= OLD_LINKS;
                }
                entries.push(entry);
            } else if matches!(told.kind, b'f' | b'd' | b'l' | b'p') {
                self.wanted.borrow_mut().push(told.path);
            } else if let Some(entry) = known.filter(|entry| !matches!(entry.node, Node::File { .. })) {
                // Devices and sockets are not packed; those of the image stay.
                entries.push((*entry).clone());
            }
        }
        Ok(entries)
    }
}

fn record(told: &mut impl BufRead) -> io::Result<Option<Told>> {
    let mut bytes = Vec::new();
    told.take(RECORD_MAX).read_until(0, &mut bytes)?;
    if bytes.pop() != Some(0) {
        return Err(bad("it ended while it told what is in it; it takes `find` and `tar` of GNU"));
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    parse(&bytes).map(Some).ok_or_else(|| bad(format!("it told `{}`", excerpt(&bytes))))
}

/// So much of a record as an error can show.
fn excerpt(record: &[u8]) -> String {
    const SHOWN: usize = 80;
    record.get(..SHOWN).unwrap_or(record).escape_ascii().to_string()
}

fn parse(record: &[u8]) -> Option<Told> {
    let mut fields = record.splitn(6, |byte| *byte == b' ');
    let kind = match fields.next()? {
        [kind] => *kind,
        _ => return None,
    };
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (device, len) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let (changed, modified) = (time(text()?)?, time(text()?)?);
    let path = Path::new(OsStr::from_bytes(fields.next()?));
    Some(Told { kind, device, len, changed, modified, path: path.to_owned() })
}

/// Seconds, and the digits after them.
fn time(text: &str) -> Option<(i64, u64)> {
    let (seconds, rest) = text.split_once('.')?;
    Some((seconds.parse().ok()?, rest.parse().ok()?))
}

/// As of a root that can be looked at: the image's file has one time.
fn is_untouched(entry: &Entry, told: &Told) -> bool {
    let Node::File { size_bytes, .. } = entry.node else { return false };
    let mtime = (entry.meta.mtime_unix_s, 0);
    told.kind == b'f' && told.changed == mtime && told.modified == mtime && told.len == size_bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_and_nonsense_is_refused() {
        let read = |bytes: &[u8]| record(&mut &*bytes);
        let told = read(b"f 38 12 1700000000.0000000000 1700000000.5000000000 etc/a b\0").unwrap().unwrap();
        assert_eq!((told.kind, told.device, told.len, &*told.path), (b'f', 38, 12, Path::new("etc/a b")));
        assert_eq!((told.changed, told.modified.1), ((1_700_000_000, 0), 5_000_000_000));
        assert!(read(b"\0").unwrap().is_none());
        for bad in [&b"f 38 12"[..], b"f 38 12\0", b"ff 1 1 1.0 1.0 x\0", b"f 1 1 1 1.0 x\0", &[b'f'; 10_000], b""] {
            assert!(read(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
