//! A tree as an EROFS image without contents: what a commit is mounted from.
//!
//! Each regular file has its length and nothing else of its own; an attribute
//! of overlayfs says which object holds the content. So the image is small,
//! is mounted in constant time, and all images share the objects' page cache.
//! It is made from the tree alone: the same tree is always the same bytes.

use std::os::unix::ffi::OsStrExt;

use super::{
    encoding::xattr_prefix,
    tree::{Entry, Node, Tree},
};

/// Source of all numbers: Linux `fs/erofs/erofs_fs.h`.
const BLOCK: u64 = 4096;
const SUPER_AT: usize = 1024;
const SUPER_LEN: u64 = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Length of an extended inode, and what inode numbers count in.
const INODE_LEN: u64 = 64;
const SLOT: u64 = 32;
const DIRENT_LEN: u64 = 12;
/// Length of the header of an inode's attributes.
const XATTR_HEADER_LEN: usize = 12;
/// Longest tail that fits in a block behind any inode: see [`place`].
const INLINE_MAX: u64 = BLOCK - SLOT;
/// Says that a chunk is nowhere.
const NULL_ADDRESS: u32 = u32::MAX;

/// How an inode's content is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// In blocks, or there is none.
    Plain = 0,
    /// In blocks, the rest behind the inode.
    Inline = 2,
    /// In chunks that are elsewhere.
    Chunks = 4,
}

struct Inode<'a> {
    entry: &'a Entry,
    links: u32,
    xattrs: Vec<u8>,
    /// Of a directory, in the order of their bytes, `.` and `..` included.
    names: Vec<(&'a [u8], usize)>,
    /// How many of the names are in each block.
    blocks: Vec<usize>,
    size: u64,
    /// Bytes behind the inode and its attributes.
    tail: u64,
    layout: Layout,
    at: u64,
    first_block: u64,
}

impl Inode<'_> {
    const fn head(&self) -> u64 {
        INODE_LEN + self.xattrs.len() as u64
    }

    const fn kind(&self) -> u8 {
        match self.entry.node {
            Node::File { .. } => 1,
            Node::Directory => 2,
            Node::CharDevice(..) => 3,
            Node::BlockDevice(..) => 4,
            Node::Fifo => 5,
            Node::Socket => 6,
            Node::Symlink(_) => 7,
        }
    }

    /// Blocks outside of the inode.
    fn outside(&self) -> u64 {
        match (self.layout, &self.entry.node) {
            (Layout::Plain, Node::Directory | Node::Symlink(_)) => self.size.div_ceil(BLOCK),
            (Layout::Inline, Node::Directory) => self.size / BLOCK,
            _ => 0,
        }
    }
}

/// The image of a tree.
pub(crate) fn image(tree: &Tree) -> Vec<u8> {
    let mut inodes = inodes(tree);
    let mut at = SUPER_AT as u64 + SUPER_LEN;
    for inode in &mut inodes {
        inode.at = place(at, inode.head(), inode.tail);
        at = (inode.at + inode.head() + inode.tail).next_multiple_of(SLOT);
    }
    let mut block = at.div_ceil(BLOCK);
    for inode in &mut inodes {
        inode.first_block = block;
        block += inode.outside();
    }
    let mut image = Image(vec![0; usize_of(block * BLOCK)]);
    image.superblock(&inodes, block);
    for inode in &inodes {
        image.inode(inode, &inodes);
    }
    image.0
}

/// Where an inode can stand at or after `at`, so that its tail is in one block.
const fn place(at: u64, head: u64, tail: u64) -> u64 {
    let tail_in_block = (at + head) % BLOCK;
    if tail == 0 || tail_in_block + tail <= BLOCK { at } else { at + (BLOCK - tail_in_block).next_multiple_of(SLOT) }
}

fn inodes(tree: &Tree) -> Vec<Inode<'_>> {
    let mut inodes: Vec<Inode<'_>> = Vec::with_capacity(tree.entries().len());
    // Directories that the entry at hand is in, and the first of each group of links.
    let mut above: Vec<usize> = Vec::new();
    let mut linked: Vec<usize> = Vec::new();
    for entry in tree.entries() {
        while above.last().is_some_and(|top| inodes.get(*top).map(|i| i.entry.path.as_path()) != entry.path.parent()) {
            above.pop();
        }
        let parent = above.last().copied();
        let number = usize::try_from(entry.link()).ok().and_then(|link| link.checked_sub(1));
        let number = match number.and_then(|group| linked.get(group).copied()) {
            Some(first) => first,
            None => {
                if number.is_some() {
                    linked.push(inodes.len());
                }
                inodes.push(inode(entry, inodes.len(), parent));
                inodes.len() - 1
            }
        };
        if let Some(parent) = parent.and_then(|parent| inodes.get_mut(parent)) {
            let name = entry.path.file_name().unwrap_or_default().as_bytes();
            parent.names.push((name, number));
            parent.links += u32::from(matches!(entry.node, Node::Directory));
        }
        match inodes.get_mut(number) {
            Some(_) if matches!(entry.node, Node::Directory) => above.push(number),
            Some(inode) => inode.links += 1,
            None => {}
        }
    }
    inodes.iter_mut().filter(|inode| matches!(inode.entry.node, Node::Directory)).for_each(lay_out);
    inodes
}

fn inode<'a>(entry: &'a Entry, own: usize, parent: Option<usize>) -> Inode<'a> {
    let (size, tail, layout) = match &entry.node {
        Node::File { size_bytes: 0, .. } => (0, 0, Layout::Plain),
        Node::File { size_bytes, .. } => (*size_bytes, 4, Layout::Chunks),
        Node::Symlink(target) => match target.as_os_str().len() as u64 {
            size @ ..=INLINE_MAX => (size, size, Layout::Inline),
            size => (size, 0, Layout::Plain),
        },
        _ => (0, 0, Layout::Plain),
    };
    let directory = matches!(entry.node, Node::Directory);
    Inode {
        entry,
        links: if directory { 2 } else { 0 },
        xattrs: xattrs(entry),
        names: if directory { vec![(b".", own), (b"..", parent.unwrap_or(own))] } else { Vec::new() },
        blocks: Vec::new(),
        size,
        tail,
        layout,
        at: 0,
        first_block: 0,
    }
}

/// Distributes a directory's names over blocks.
fn lay_out(inode: &mut Inode<'_>) {
    inode.names.sort_unstable();
    let (mut count, mut used) = (0, 0);
    for (name, _) in &inode.names {
        let len = DIRENT_LEN + name.len() as u64;
        if used + len > BLOCK {
            inode.blocks.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += len;
    }
    inode.size = inode.blocks.len() as u64 * BLOCK + used;
    inode.blocks.push(count);
    if used <= INLINE_MAX {
        (inode.layout, inode.tail) = (Layout::Inline, used);
    }
}

/// The attributes of an entry as they stand behind its inode.
fn xattrs(entry: &Entry) -> Vec<u8> {
    let mut body = Vec::new();
    let mut add = |name: &[u8], value: &[u8]| {
        let Some((index, rest)) = xattr_prefix(name) else { return };
        // The lengths were checked with the tree.
        body.extend([u8::try_from(rest.len()).unwrap_or(u8::MAX), index]);
        body.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        body.extend(rest);
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    };
    for (name, value) in &entry.meta.xattrs {
        add(name, value);
    }
    if let Node::File { object: Some(object), .. } = &entry.node {
        // Source: Linux `fs/overlayfs/overlayfs.h`, struct ovl_metacopy:
        // version, length, flags, algorithm (1 is SHA-256), digest. A host with
        // fs-verity can hold the content to it.
        let mut metacopy = vec![0, 36, 0, 1];
        metacopy.extend(object.digest().bytes());
        add(b"trusted.overlay.metacopy", &metacopy);
        add(b"trusted.overlay.redirect", format!("/{}", super::objects::name(*object)).as_bytes());
    }
    if body.is_empty() {
        return body;
    }
    let mut whole = vec![0; XATTR_HEADER_LEN];
    whole.append(&mut body);
    whole
}

struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize_of(at);
        if let Some(to) = self.0.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    fn superblock(&mut self, inodes: &[Inode<'_>], blocks: u64) {
        let root = inodes.first().map_or(0, |root| root.at / SLOT);
        let mut block = Vec::new();
        block.extend(MAGIC.to_le_bytes());
        block.extend([0; 4]); // checksum: the id of the tree is one
        block.extend(COMPAT_MTIME.to_le_bytes());
        block.extend([12, 0]); // log2 of the block's length, no more slots
        block.extend(u16_of(root).to_le_bytes());
        block.extend((inodes.len() as u64).to_le_bytes());
        block.extend([0; 12]); // time, for inodes without their own
        block.extend(u32_of(blocks).to_le_bytes());
        block.extend([0; 8 + 32]); // where inodes and shared attributes begin; ids
        block.extend(INCOMPAT_CHUNKED_FILE.to_le_bytes());
        self.put(SUPER_AT as u64, &block);
    }

    fn inode(&mut self, inode: &Inode<'_>, inodes: &[Inode<'_>]) {
        let Entry { meta, node, .. } = inode.entry;
        let kind: u16 = match node {
            Node::File { .. } => 0o100_000,
            Node::Directory => 0o040_000,
            Node::Symlink(_) => 0o120_000,
            Node::Fifo => 0o010_000,
            Node::Socket => 0o140_000,
            Node::CharDevice(..) => 0o020_000,
            Node::BlockDevice(..) => 0o060_000,
        };
        let place = match node {
            Node::File { size_bytes: 1.., .. } => u32_of(chunk_bits(inode.size) - 12),
            // Source: Linux `include/linux/kdev_t.h`, new_encode_dev.
            Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            _ if inode.outside() > 0 => u32_of(inode.first_block),
            _ => 0,
        };
        let xattr_words = inode.xattrs.len().saturating_sub(XATTR_HEADER_LEN) / 4;
        let xattr_count = if inode.xattrs.is_empty() { 0 } else { xattr_words as u64 + 1 };
        let mut head = Vec::new();
        head.extend((1 | (inode.layout as u16) << 1).to_le_bytes());
        head.extend(u16_of(xattr_count).to_le_bytes());
        head.extend((kind | u16_of(meta.mode.into())).to_le_bytes());
        head.extend([0; 2]);
        head.extend(inode.size.to_le_bytes());
        head.extend(place.to_le_bytes());
        head.extend(u32_of(inode.at / SLOT).to_le_bytes());
        head.extend(meta.uid.to_le_bytes());
        head.extend(meta.gid.to_le_bytes());
        head.extend(meta.mtime_unix_s.to_le_bytes());
        head.extend([0; 4]); // nanoseconds
        head.extend(inode.links.to_le_bytes());
        self.put(inode.at, &head);
        self.put(inode.at + INODE_LEN, &inode.xattrs);
        let tail = inode.at + inode.head();
        match node {
            Node::File { size_bytes: 1.., .. } => self.put(tail, &NULL_ADDRESS.to_le_bytes()),
            Node::Symlink(target) if inode.layout == Layout::Inline => self.put(tail, target.as_os_str().as_bytes()),
            Node::Symlink(target) => self.put(inode.first_block * BLOCK, target.as_os_str().as_bytes()),
            Node::Directory => self.directory(inode, inodes, tail),
            _ => {}
        }
    }

    fn directory(&mut self, inode: &Inode<'_>, inodes: &[Inode<'_>], tail: u64) {
        let mut names = inode.names.as_slice();
        for (number, count) in inode.blocks.iter().enumerate() {
            let (now, later) = names.split_at(*count);
            names = later;
            let inline = inode.layout == Layout::Inline && later.is_empty();
            let at = if inline { tail } else { (inode.first_block + number as u64) * BLOCK };
            let mut name_at = now.len() as u64 * DIRENT_LEN;
            for (number, (name, target)) in now.iter().enumerate() {
                let Some(target) = inodes.get(*target) else { continue };
                let mut dirent = Vec::new();
                dirent.extend((target.at / SLOT).to_le_bytes());
                dirent.extend(u16_of(name_at).to_le_bytes());
                dirent.extend([target.kind(), 0]);
                self.put(at + number as u64 * DIRENT_LEN, &dirent);
                self.put(at + name_at, name);
                name_at += name.len() as u64;
            }
        }
    }
}

/// Log2 of the length of the one chunk that a file of this size is.
fn chunk_bits(size: u64) -> u64 {
    u64::from(size.next_power_of_two().trailing_zeros()).max(12)
}

/// The limits of trees keep every number within what its field holds.
fn u16_of(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

fn u32_of(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
