//! The canonical bytes of a tree.
//!
//! A first line that names the format, the number of entries, then each entry:
//! path, kind, mode, owner, time, attributes, and what its kind needs. Numbers
//! are little-endian, texts have their length in front.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use qvd_core::Digest;

use super::{
    ObjectId,
    tree::{Entry, Meta, Node, TREE_MAX_ENTRIES, TreeError},
};

const MAGIC: &[u8] = b"qvd-tree-1\n";

/// Namespaces of attributes that a tree may have, with their numbers in EROFS.
/// Source: Linux `fs/erofs/erofs_fs.h`, EROFS_XATTR_INDEX_*.
const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// The number of an attribute's namespace, and the rest of its name.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // The two about access lists are whole names.
        (prefix.ends_with(b".") != rest.is_empty()).then_some((*index, rest))
    })
}

pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut to = Vec::with_capacity(MAGIC.len() + entries.len() * 128);
    to.extend(MAGIC);
    // Checked trees have lengths that fit: see `tree::check`.
    put_u32(&mut to, entries.len());
    for entry in entries {
        put_short(&mut to, entry.path.as_os_str().as_bytes());
        to.push(kind(&entry.node));
        put_u16(&mut to, entry.meta.mode as usize);
        to.extend(entry.meta.uid.to_le_bytes());
        to.extend(entry.meta.gid.to_le_bytes());
        to.extend(entry.meta.mtime_unix_s.to_le_bytes());
        put_u16(&mut to, entry.meta.xattrs.len());
        for (name, value) in &entry.meta.xattrs {
            put_short(&mut to, name);
            put_short(&mut to, value);
        }
        match &entry.node {
            Node::File { object, size_bytes, link } => {
                to.extend(size_bytes.to_le_bytes());
                to.extend(link.to_le_bytes());
                if let Some(object) = object {
                    to.extend(object.digest().bytes());
                }
            }
            Node::Symlink(target) => put_short(&mut to, target.as_os_str().as_bytes()),
            Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
                to.extend(major.to_le_bytes());
                to.extend(minor.to_le_bytes());
            }
            Node::Directory | Node::Fifo | Node::Socket => {}
        }
    }
    to
}

const fn kind(node: &Node) -> u8 {
    match node {
        Node::Directory => b'd',
        Node::File { .. } => b'f',
        Node::Symlink(_) => b'l',
        Node::Fifo => b'p',
        Node::Socket => b's',
        Node::CharDevice(..) => b'c',
        Node::BlockDevice(..) => b'b',
    }
}

fn put_u16(to: &mut Vec<u8>, number: usize) {
    to.extend(u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes());
}

fn put_u32(to: &mut Vec<u8>, number: usize) {
    to.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_short(to: &mut Vec<u8>, bytes: &[u8]) {
    put_u16(to, bytes.len());
    to.extend(bytes);
}

/// Reads what `encode` wrote. Nothing is believed but what was read: memory
/// grows with the bytes that are there, not with the numbers in them.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Entry>, TreeError> {
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        return Err(TreeError::new("", "the list of entries begins with something else than its format"));
    };
    let mut from = Reader { rest, at: PathBuf::new() };
    let count = from.u32()? as usize;
    if count > TREE_MAX_ENTRIES {
        return Err(TreeError::new("", format!("it has more than {TREE_MAX_ENTRIES} entries")));
    }
    let mut entries = Vec::new();
    for _ in 0..count {
        entries.push(from.entry()?);
    }
    if from.rest.is_empty() { Ok(entries) } else { Err(from.error("something follows the last entry")) }
}

struct Reader<'a> {
    rest: &'a [u8],
    at: PathBuf,
}

impl<'a> Reader<'a> {
    fn entry(&mut self) -> Result<Entry, TreeError> {
        let path = self.path()?;
        self.at.clone_from(&path);
        let kind = self.u8()?;
        let (mode, uid, gid) = (u32::from(self.u16()?), self.u32()?, self.u32()?);
        let mtime_unix_s = i64::from_le_bytes(self.array()?);
        let mut xattrs = BTreeMap::new();
        for _ in 0..self.u16()? {
            let (name, value) = (self.short()?.to_vec(), self.short()?.to_vec());
            xattrs.insert(name, value);
        }
        let node = match kind {
            b'd' => Node::Directory,
            b'f' => {
                let (size_bytes, link) = (u64::from_le_bytes(self.array()?), self.u32()?);
                let object = match size_bytes {
                    0 => None,
                    _ => Some(ObjectId::new(Digest::new(self.array()?))),
                };
                Node::File { object, size_bytes, link }
            }
            b'l' => Node::Symlink(self.path()?),
            b'p' => Node::Fifo,
            b's' => Node::Socket,
            b'c' => Node::CharDevice(self.u32()?, self.u32()?),
            b'b' => Node::BlockDevice(self.u32()?, self.u32()?),
            other => return Err(self.error(format!("there is no kind {other}"))),
        };
        Ok(Entry { path, meta: Meta { mode, uid, gid, mtime_unix_s, xattrs }, node })
    }

    fn error(&self, reason: impl Into<String>) -> TreeError {
        TreeError::new(&self.at, reason)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], TreeError> {
        let (taken, rest) =
            self.rest.split_at_checked(len).ok_or_else(|| self.error("the list of entries ends here"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TreeError> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| self.error("the list of entries ends here"))
    }

    fn u8(&mut self) -> Result<u8, TreeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, TreeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, TreeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn short(&mut self) -> Result<&'a [u8], TreeError> {
        let len = self.u16()?;
        self.take(len.into())
    }

    fn path(&mut self) -> Result<PathBuf, TreeError> {
        Ok(Path::new(OsStr::from_bytes(self.short()?)).to_path_buf())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{super::tree::Tree, *};

    fn entry(path: &str, node: Node) -> Entry {
        Entry { path: path.into(), meta: Meta { mode: 0o755, ..Meta::default() }, node }
    }

    fn file(number: u8, link: u32) -> Node {
        Node::File { object: Some(ObjectId::new(Digest::new([number; 32]))), size_bytes: 3, link }
    }

    fn entries() -> Vec<Entry> {
        let mut with_attribute = entry("etc/f", file(1, 0));
        with_attribute.meta.xattrs.insert(b"user.x".to_vec(), b"1".to_vec());
        vec![
            entry("", Node::Directory),
            entry("z", Node::CharDevice(1, 3)),
            entry("etc.d", Node::Directory),
            with_attribute,
            entry("etc", Node::Directory),
            entry("a", file(2, 9)),
            entry("b", file(2, 9)),
            entry("l", Node::Symlink("../../etc/shadow".into())),
            entry("empty", Node::File { object: None, size_bytes: 0, link: 7 }),
        ]
    }

    #[test]
    fn a_tree_is_read_back_and_no_flipped_bit_goes_unseen() {
        let tree = Tree::new(entries()).unwrap();
        let order: Vec<_> = tree.entries().iter().map(|e| e.path.to_str().unwrap()).collect();
        assert_eq!(order, ["", "a", "b", "empty", "etc", "etc/f", "etc.d", "l", "z"]);
        let (id, bytes) = tree.encode();
        assert_eq!(Tree::decode(&bytes).unwrap(), (id, tree.clone()));
        assert_eq!((tree.size_bytes(), tree.objects().count()), (6, 3));
        for n in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[n / 8] ^= 1 << (n % 8);
            assert!(Tree::decode(&flipped).map_or(true, |(other, _)| other != id), "bit {n}");
        }
        for len in 0..bytes.len() {
            Tree::decode(&bytes[..len]).unwrap_err();
        }
    }

    #[test]
    fn what_could_leave_a_tree_or_deceive_overlayfs_is_refused() {
        let mut attribute = entry("x", file(1, 0));
        attribute.meta.xattrs.insert(b"trusted.overlay.redirect".to_vec(), b"/etc".to_vec());
        let mut acl = entry("x", file(1, 0));
        acl.meta.xattrs.insert(b"system.posix_acl_accessory".to_vec(), vec![]);
        let cases = [
            (entry("../x", file(1, 0)), "not plain"),
            (entry("/x", file(1, 0)), "not plain"),
            (entry("etc//x", file(1, 0)), "not plain"),
            (entry("etc/./x", file(1, 0)), "not plain"),
            (entry("no/x", file(1, 0)), "no directory"),
            (entry("l/x", file(1, 0)), "no directory"),
            (entry("etc", Node::Directory), "twice"),
            (entry("x\0y", file(1, 0)), "NUL"),
            (entry(&"x".repeat(256), file(1, 0)), "256 bytes"),
            (entry("x", Node::CharDevice(0, 0)), "whiteout"),
            (entry("x", Node::Symlink("".into())), "nowhere"),
            (entry("x", Node::File { object: None, size_bytes: 1, link: 0 }), "length"),
            (entry("x", file(3, 9)), "same file"),
            (attribute, "belongs to overlayfs"),
            (acl, "cannot be called"),
        ];
        for (bad, reason) in cases {
            let mut list = entries();
            list.push(bad);
            let error = Tree::new(list).unwrap_err();
            assert!(error.reason.contains(reason), "{error} instead of {reason}");
        }
        assert!(Tree::new(vec![]).is_err());
        assert!(Tree::new(vec![entry("", file(1, 0))]).is_err());
    }
}
