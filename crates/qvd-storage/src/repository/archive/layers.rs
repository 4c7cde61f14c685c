//! From the members of archives to a tree, one archive over the other.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use super::tar::{self, Kind, Member, bad};
use crate::repository::{Entry, Meta, Node, Staging, TREE_MAX_ENTRIES, encoding};

/// Most bytes that paths, links and attributes may have together.
const NAMES_MAX_BYTES: u64 = 256 << 20;
/// Prefix of a name that takes another away from the layers below, and the
/// name that takes everything. Source: OCI image specification, "Whiteouts".
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A tree in the making.
pub(crate) struct Layers<'s, 'r> {
    staging: &'s Staging<'r>,
    /// By path, so that what is below a directory stands together.
    entries: BTreeMap<Vec<u8>, Slot>,
    layer: u32,
    links: u32,
    names_bytes: u64,
    /// How many entries there may be.
    max_entries: usize,
}

struct Slot {
    entry: Entry,
    layer: u32,
    /// It is there because something in it is.
    implied: bool,
}

impl<'s, 'r> Layers<'s, 'r> {
    pub(crate) const fn new(staging: &'s Staging<'r>) -> Self {
        Self { staging, entries: BTreeMap::new(), layer: 0, links: 0, names_bytes: 0, max_entries: TREE_MAX_ENTRIES }
    }

    /// Lays an archive over what is there. Of `whiteouts` only layers have any.
    pub(crate) fn add(&mut self, from: impl Read, whiteouts: bool) -> io::Result<()> {
        self.layer += 1;
        let mut reader = tar::Reader::new(from);
        while let Some(member) = reader.next()? {
            let shown = String::from_utf8_lossy(&member.path).into_owned();
            let named = |error: io::Error| match error.kind() {
                io::ErrorKind::InvalidData => bad(format!("`{shown}` {error}")),
                _ => error,
            };
            let path = plain(&member.path).map_err(named)?;
            let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            if whiteouts && name.starts_with(WHITEOUT) {
                self.white_out(&path, name).map_err(named)?;
                continue;
            }
            self.member(path, member, &mut reader.content()).map_err(named)?;
        }
        // A digest over the whole file needs all of it read.
        io::copy(&mut reader.into_rest(), &mut io::sink())?;
        Ok(())
    }

    /// Every entry; a root that the archives do not have is added.
    pub(crate) fn finish(mut self) -> Vec<Entry> {
        self.entries.entry(Vec::new()).or_insert_with(|| implied(&[], self.layer));
        self.entries.into_values().map(|slot| slot.entry).collect()
    }

    fn member(&mut self, path: Vec<u8>, member: Member, content: &mut dyn Read) -> io::Result<()> {
        let names = path.len() + member.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        self.expect_room(names)?;
        self.parents(&path)?;
        self.make_way(&path, &member.kind)?;
        let meta = Meta {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime_unix_s: member.mtime_unix_s,
            // Whoever wrote the archive may have seen what overlayfs keeps.
            xattrs: member
                .xattrs
                .into_iter()
                .filter(|(name, _)| !name.starts_with(b"trusted.overlay.") && encoding::xattr_prefix(name).is_some())
                .collect(),
        };
        let (meta, node) = match member.kind {
            Kind::Directory => (meta, Node::Directory),
            Kind::Fifo => (meta, Node::Fifo),
            Kind::Symlink(target) => (meta, Node::Symlink(os_path(&target))),
            Kind::HardLink(target) => self.hard_link(&target)?,
            Kind::Device => {
                return Err(bad("is a device node, which no image needs: a desktop has a `/dev` of its own"));
            }
            Kind::File => {
                let (object, size_bytes) = self.staging.put(content)?;
                (meta, Node::File { object, size_bytes, link: 0 })
            }
        };
        let entry = Entry { path: os_path(&path), meta, node };
        self.entries.insert(path, Slot { entry, layer: self.layer, implied: false });
        Ok(())
    }

    /// Counts an entry whose names and attributes have so many bytes.
    fn expect_room(&mut self, names: usize) -> io::Result<()> {
        self.names_bytes += names as u64;
        if self.names_bytes > NAMES_MAX_BYTES || self.entries.len() >= self.max_entries {
            let most = self.max_entries;
            return Err(bad(format!("is one too many: more than {most} entries, or than their names may take")));
        }
        Ok(())
    }

    /// Another name of a file that is there; from now on both are in a group.
    fn hard_link(&mut self, target: &[u8]) -> io::Result<(Meta, Node)> {
        let shown = String::from_utf8_lossy(target).into_owned();
        let target = plain(target).map_err(|error| bad(format!("is a hard link to `{shown}`, which {error}")))?;
        let next = self.links + 1;
        let Some(Slot { entry, .. }) = self.entries.get_mut(&target) else {
            return Err(bad(format!("is a hard link to `{shown}`, which is not in the archive before it")));
        };
        match &mut entry.node {
            Node::File { link, .. } => {
                if *link == 0 {
                    *link = next;
                    self.links = next;
                }
                Ok((entry.meta.clone(), entry.node.clone()))
            }
            // Some link symbolic links too; a second one is as good.
            Node::Symlink(_) => Ok((entry.meta.clone(), entry.node.clone())),
            _ => Err(bad(format!("is a hard link to `{shown}`, which is no file"))),
        }
    }

    /// Sees to it that what a path is in are directories.
    fn parents(&mut self, path: &[u8]) -> io::Result<()> {
        let mut ends: Vec<usize> = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at).collect();
        if !path.is_empty() {
            ends.insert(0, 0);
        }
        for end in ends {
            let above = path.get(..end).unwrap_or_default();
            match self.entries.get(above).map(|slot| &slot.entry.node) {
                Some(Node::Directory) => {}
                Some(_) => {
                    let above = String::from_utf8_lossy(above).into_owned();
                    return Err(bad(format!("goes through `{above}`, which is no directory")));
                }
                None => {
                    // A short archive can imply many long names.
                    self.expect_room(above.len())?;
                    self.entries.insert(above.to_vec(), implied(above, self.layer));
                }
            }
        }
        Ok(())
    }

    /// Takes away what a new entry replaces: only that of layers below may be.
    fn make_way(&mut self, path: &[u8], kind: &Kind) -> io::Result<()> {
        let Some(slot) = self.entries.get(path) else { return Ok(()) };
        if slot.layer == self.layer && !slot.implied {
            return Err(bad("is in the archive twice"));
        }
        match (&slot.entry.node, kind) {
            (Node::Directory, Kind::Directory) => {}
            (Node::Directory, _) if slot.layer == self.layer => {
                return Err(bad("is no directory, but something was in it before"));
            }
            (Node::Directory, _) => self.remove_below(path, |_| true),
            _ => {}
        }
        Ok(())
    }

    fn white_out(&mut self, path: &[u8], name: &[u8]) -> io::Result<()> {
        let dir = path.strip_suffix(name).unwrap_or_default();
        let dir = dir.strip_suffix(b"/").unwrap_or(dir);
        let layer = self.layer;
        if name == OPAQUE {
            self.remove_below(dir, |slot| slot.layer < layer);
            return Ok(());
        }
        let name = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(name, b"" | b"." | b"..") {
            return Err(bad("takes nothing away that could be"));
        }
        let gone = if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() };
        if self.entries.get(&gone).is_some_and(|slot| slot.layer < layer) {
            self.entries.remove(&gone);
            self.remove_below(&gone, |_| true);
        }
        Ok(())
    }

    /// Removes what is in a directory.
    fn remove_below(&mut self, dir: &[u8], which: impl Fn(&Slot) -> bool) {
        // All that begins with `dir/`; `0` is the byte after `/`.
        let range = match dir {
            b"" => vec![0]..vec![u8::MAX; 2],
            _ => [dir, b"/"].concat()..[dir, b"0"].concat(),
        };
        let gone: Vec<Vec<u8>> =
            self.entries.range(range).filter(|(_, slot)| which(slot)).map(|(path, _)| path.clone()).collect();
        for path in gone {
            self.entries.remove(&path);
        }
    }
}

fn implied(path: &[u8], layer: u32) -> Slot {
    let meta = Meta { mode: 0o755, ..Meta::default() };
    Slot { entry: Entry { path: os_path(path), meta, node: Node::Directory }, layer, implied: true }
}

fn os_path(path: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(path))
}

/// A path without what may stand at its ends; nothing that leaves the tree.
fn plain(path: &[u8]) -> io::Result<Vec<u8>> {
    if path.starts_with(b"/") {
        return Err(bad("is an absolute name"));
    }
    let mut rest = path;
    while let Some(shorter) = rest.strip_prefix(b"./") {
        rest = shorter;
    }
    let rest = rest.strip_suffix(b"/").unwrap_or(rest);
    if rest == b"." || rest.is_empty() && !path.is_empty() {
        return Ok(Vec::new());
    }
    for name in rest.split(|byte| *byte == b'/') {
        match name {
            b".." => return Err(bad("leads out of the archive by `..`")),
            b"" | b"." => return Err(bad("is no plain path")),
            name if name.len() > 255 || rest.len() > 4095 => return Err(bad("is too long for a path")),
            name if name.contains(&0) => return Err(bad("has a NUL in it")),
            _ => {}
        }
    }
    Ok(rest.to_vec())
}

/// Members of an archive that are kept as they are: where each begins.
pub(crate) type Index = HashMap<Vec<u8>, (u64, u64)>;

/// Finds where the content of each file in an archive is.
pub(crate) fn index(from: impl Read) -> io::Result<Index> {
    let mut reader = tar::Reader::new(from);
    let mut found = Index::new();
    while let Some(member) = reader.next()? {
        if member.kind == Kind::File {
            if found.len() >= TREE_MAX_ENTRIES / 100 {
                return Err(bad("it has too many members for an OCI archive"));
            }
            found.insert(plain(&member.path)?, (reader.position(), member.size_bytes));
        }
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        Repository,
        repository::{Tree, archive::write},
    };

    /// As many files as asked for, one after the other; a content each, or none.
    fn archive(files: u32, content: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in 0..files {
            let content = if content { number.to_string() } else { String::new() };
            write::file(&mut bytes, &format!("d/{number}"), &mut content.as_bytes(), content.len() as u64).unwrap();
        }
        write::end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn one_entry_more_than_there_may_be_is_refused_and_nothing_of_it_stays() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::open(dir.path()).unwrap();
        let staging = repository.stage().unwrap();
        let limited = |max_entries| Layers { max_entries, ..Layers::new(&staging) };
        let add = |most: usize, from: &[u8]| limited(most).add(from, false).map_err(|error| error.to_string());

        // The root, the directory that they imply, and a hundred files.
        let mut layers = limited(102);
        layers.add(&*archive(100, true), false).unwrap();
        assert_eq!(Tree::new(layers.finish()).unwrap().entries().len(), 102);
        let refused = add(102, &archive(101, true)).unwrap_err();
        assert!(refused.contains("`d/100` is one too many: more than 102 entries"), "{refused}");
        // Layers over each other are one tree; what implies directories is counted with them.
        let mut layers = limited(102);
        layers.add(&*archive(100, false), true).unwrap();
        let mut more = Vec::new();
        write::file(&mut more, "e/f/g", &mut &b""[..], 0).unwrap();
        assert!(layers.add(&*more, true).unwrap_err().to_string().contains("more than 102 entries"));
        // It is noticed where it happens: what comes behind is not read.
        let mut endless = archive(101, false);
        endless.truncate(endless.len() - 1024);
        let mut behind = std::io::Cursor::new([endless, vec![7; 1 << 20]].concat());
        assert!(limited(50).add(&mut behind, false).is_err());
        assert!(behind.position() < 64 << 10, "{}", behind.position());
        drop(staging);
        for below in ["incoming", "objects"] {
            assert_eq!(std::fs::read_dir(dir.path().join(below)).unwrap().count(), 0, "{below}");
        }
    }
}
