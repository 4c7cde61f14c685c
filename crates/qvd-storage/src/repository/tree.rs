//! File trees as lists: what an image holds, without the contents themselves.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use qvd_core::Digest;
use sha2::{Digest as _, Sha256};

use super::{ObjectId, TreeId, encoding};

/// Most entries that a tree may have: ten times a full desktop installation.
/// It bounds the memory that a foreign tree can take.
pub const TREE_MAX_ENTRIES: usize = 2_000_000;
/// Largest file in bytes: what one EROFS chunk map entry of ours covers.
pub const FILE_MAX_BYTES: u64 = 1 << 42;

/// A file tree: every entry with everything but its content, in one order.
///
/// A tree is checked when it is made, wherever it comes from. Its id is the
/// SHA-256 of [`Tree::encode`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    entries: Vec<Entry>,
}

/// A name in a tree and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is, relative to the root, whose path is empty.
    pub path: PathBuf,
    /// Owner, permissions and attributes.
    pub meta: Meta,
    /// What is there.
    pub node: Node,
}

/// Owner, permissions and attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits, set-id and sticky bits included.
    pub mode: u32,
    /// Owner's id inside.
    pub uid: u32,
    /// Group's id inside.
    pub gid: u32,
    /// Last change of the content, in seconds since 1970.
    pub mtime_unix_s: i64,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its content; none when it is empty.
        object: Option<ObjectId>,
        /// Length in bytes.
        size_bytes: u64,
        /// Entries with the same number are one file with several names; 0 is
        /// a file of its own. [`Tree::new`] numbers them.
        link: u32,
    },
    /// A symbolic link and where it leads.
    Symlink(PathBuf),
    /// A named pipe.
    Fifo,
    /// The name of a socket.
    Socket,
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
}

/// Why a list of entries is no tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`/{}` cannot be in a tree: {reason}", path.display())]
pub struct TreeError {
    /// Entry in question.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl TreeError {
    pub(crate) fn new(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }
}

impl Tree {
    /// Puts entries in order and checks them. There must be a root: an entry
    /// with an empty path.
    ///
    /// # Errors
    /// The first entry that cannot be: a name twice or outside, a missing
    /// directory, an attribute that would make overlayfs show something else.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, TreeError> {
        if entries.len() > TREE_MAX_ENTRIES {
            return Err(TreeError::new("", format!("it has more than {TREE_MAX_ENTRIES} entries")));
        }
        entries.sort_unstable_by(|a, b| path_order(&a.path, &b.path));
        let mut above: Vec<&Path> = Vec::new();
        let mut previous: Option<&Path> = None;
        for entry in &entries {
            check(entry).map_err(|reason| TreeError::new(&entry.path, reason))?;
            if previous == Some(&entry.path) {
                return Err(TreeError::new(&entry.path, "the name is there twice"));
            }
            previous = Some(&entry.path);
            let parent = entry.path.parent();
            while above.last().is_some_and(|top| Some(*top) != parent) {
                above.pop();
            }
            if above.is_empty() && parent.is_some() {
                return Err(TreeError::new(&entry.path, "it is in something that is no directory of the tree"));
            }
            if matches!(entry.node, Node::Directory) {
                above.push(&entry.path);
            } else if parent.is_none() {
                return Err(TreeError::new("", "the root is no directory"));
            }
        }
        if previous.is_none() {
            return Err(TreeError::new("", "it is missing"));
        }
        let mut tree = Self { entries };
        tree.number_links()?;
        Ok(tree)
    }

    /// Numbers the groups of names of one file by their first, so that equal
    /// trees are equal bytes.
    fn number_links(&mut self) -> Result<(), TreeError> {
        let mut groups: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            if let Node::File { link: 1.., .. } = entry.node {
                groups.entry(entry.link()).or_default().push(at);
            }
        }
        let mut groups: Vec<Vec<usize>> = groups.into_values().collect();
        groups.sort_unstable();
        let mut next = 0;
        for group in groups {
            let first = group.first().and_then(|at| self.entries.get(*at)).cloned();
            if group.len() > 1 {
                next += 1;
            }
            for at in &group {
                let Some(entry) = self.entries.get_mut(*at) else { continue };
                if first.as_ref().is_some_and(|first| first.meta != entry.meta || first.node != entry.node) {
                    return Err(TreeError::new(&entry.path, "another name of the same file says something else"));
                }
                if let Node::File { link, .. } = &mut entry.node {
                    *link = if group.len() > 1 { next } else { 0 };
                }
            }
        }
        Ok(())
    }

    /// Every entry: a directory before what is in it, names by their bytes.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry at a path.
    #[must_use]
    pub fn get(&self, path: &Path) -> Option<&Entry> {
        let at = self.entries.binary_search_by(|entry| path_order(&entry.path, path)).ok()?;
        self.entries.get(at)
    }

    /// Bytes of its regular files; a file with several names counts once.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        let mut seen = 0;
        let mut total = 0_u64;
        for entry in &self.entries {
            if let Node::File { size_bytes, link, .. } = entry.node
                && (link == 0 || link > seen)
            {
                seen = seen.max(link);
                total = total.saturating_add(size_bytes);
            }
        }
        total
    }

    /// Every content that it needs, as often as it is named, with its length in bytes.
    pub fn objects(&self) -> impl Iterator<Item = (ObjectId, u64)> + '_ {
        self.entries.iter().filter_map(|entry| match entry.node {
            Node::File { object: Some(object), size_bytes, .. } => Some((object, size_bytes)),
            _ => None,
        })
    }

    /// Its canonical encoding and the id that this gives.
    #[must_use]
    pub fn encode(&self) -> (TreeId, Vec<u8>) {
        let bytes = encoding::encode(&self.entries);
        (Self::id_of(&bytes), bytes)
    }

    /// The id of an encoded tree, whatever the bytes are.
    #[must_use]
    pub fn id_of(bytes: &[u8]) -> TreeId {
        TreeId::new(Digest::new(Sha256::digest(bytes).into()))
    }

    /// Reads a tree and its id from its canonical encoding.
    ///
    /// # Errors
    /// Why the bytes are no tree: among others when they encode one in another
    /// way than [`Tree::encode`] does.
    pub fn decode(bytes: &[u8]) -> Result<(TreeId, Self), TreeError> {
        let tree = Self::new(encoding::decode(bytes)?)?;
        let (id, canonical) = tree.encode();
        if canonical == bytes {
            Ok((id, tree))
        } else {
            Err(TreeError::new("", "the list of entries is not in the canonical encoding"))
        }
    }
}

impl Tree {
    /// Reads a tree that was checked before it was given the id that its
    /// encoding still has.
    pub(crate) fn decode_checked(bytes: &[u8]) -> Result<Self, TreeError> {
        Ok(Self { entries: encoding::decode(bytes)? })
    }
}

impl Entry {
    /// The number of its group of names, 0 for none.
    pub(crate) const fn link(&self) -> u32 {
        match self.node {
            Node::File { link, .. } => link,
            _ => 0,
        }
    }
}

/// The order of entries: by components, so that a directory is followed by
/// what is in it. NUL is in no name.
pub(crate) fn path_order(a: &Path, b: &Path) -> Ordering {
    let by_component = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    let (a, b) = (a.as_os_str().as_bytes(), b.as_os_str().as_bytes());
    a.iter().map(by_component).cmp(b.iter().map(by_component))
}

fn check(entry: &Entry) -> Result<(), String> {
    check_path(&entry.path)?;
    if entry.meta.mode > 0o7777 {
        return Err(format!("its mode is {:o}", entry.meta.mode));
    }
    let mut attribute_bytes = 0;
    for (name, value) in &entry.meta.xattrs {
        check_attribute(name, value)?;
        attribute_bytes += name.len() + value.len();
    }
    // Source: Linux `include/uapi/linux/limits.h`, XATTR_LIST_MAX.
    if attribute_bytes > 65536 {
        return Err(format!("its extended attributes have {attribute_bytes} bytes"));
    }
    match &entry.node {
        Node::File { object, size_bytes, .. } => {
            if object.is_none() != (*size_bytes == 0) {
                return Err(format!("its length of {size_bytes} bytes does not go with its content"));
            }
            if *size_bytes > FILE_MAX_BYTES {
                return Err(format!("its {size_bytes} bytes are more than {FILE_MAX_BYTES}"));
            }
        }
        Node::Symlink(target) => check_target(target)?,
        // To overlayfs it says that a name is not there.
        Node::CharDevice(0, 0) => return Err("the device 0:0 is a whiteout".to_owned()),
        // Source: Linux `include/linux/kdev_t.h`, 12 and 20 bits.
        Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
            if *major >= 1 << 12 || *minor >= 1 << 20 {
                return Err(format!("there is no device {major}:{minor}"));
            }
        }
        Node::Directory | Node::Fifo | Node::Socket => {}
    }
    Ok(())
}

fn check_path(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().as_bytes();
    // Source: Linux `include/uapi/linux/limits.h`, PATH_MAX with its NUL, NAME_MAX.
    if bytes.len() > 4095 {
        return Err(format!("its path has {} bytes", bytes.len()));
    }
    if bytes.is_empty() {
        return Ok(());
    }
    for name in bytes.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." | b".." => return Err("its path is not plain".to_owned()),
            name if name.len() > 255 => return Err(format!("its name has {} bytes", name.len())),
            name if name.contains(&0) => return Err("there is a NUL in its name".to_owned()),
            _ => {}
        }
    }
    Ok(())
}

fn check_target(target: &Path) -> Result<(), String> {
    let bytes = target.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > 4095 || bytes.contains(&0) {
        return Err("it leads nowhere".to_owned());
    }
    Ok(())
}

fn check_attribute(name: &[u8], value: &[u8]) -> Result<(), String> {
    let shown = || OsStr::from_bytes(name).display().to_string();
    if name.starts_with(b"trusted.overlay.") {
        return Err(format!("`{}` belongs to overlayfs", shown()));
    }
    let known = encoding::xattr_prefix(name).is_some_and(|(_, rest)| rest.len() < 256);
    if !known || name.contains(&0) {
        return Err(format!("an extended attribute cannot be called `{}`", shown()));
    }
    // Source: Linux `include/uapi/linux/limits.h`, XATTR_SIZE_MAX is 65536;
    // EROFS has 16 bits for it.
    if value.len() > 65535 {
        return Err(format!("its attribute `{}` has {} bytes", shown(), value.len()));
    }
    Ok(())
}
