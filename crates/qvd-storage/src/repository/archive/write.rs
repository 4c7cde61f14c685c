//! Writing tar: POSIX headers, extended ones where they do not suffice.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::repository::{Entry, Meta, Node, ObjectId, Tree};

const BLOCK: u64 = 512;
/// Largest number of eleven octal digits.
const OCTAL_MAX: u64 = 0o777_7777_7777;
/// Largest number of seven octal digits.
const ID_MAX: u32 = 0o777_7777;

/// Writes a tree; `open` gives its contents. Sockets, which tar does not have,
/// are left out.
pub(crate) fn tree(
    tree: &Tree,
    to: &mut dyn Write,
    open: &mut dyn FnMut(ObjectId) -> io::Result<Box<dyn Read>>,
) -> io::Result<()> {
    let mut firsts: HashMap<u32, PathBuf> = HashMap::new();
    for entry in tree.entries() {
        let first = firsts.get(&entry.link()).filter(|_| entry.link() > 0);
        match (&entry.node, first) {
            (Node::Socket, _) => continue,
            (_, Some(first)) => header(to, entry, b'1', 0, first)?,
            (Node::File { object, size_bytes, .. }, None) => {
                header(to, entry, b'0', *size_bytes, Path::new(""))?;
                if let Some(object) = object {
                    content(to, &mut open(*object)?, *size_bytes)?;
                }
            }
            (Node::Directory, None) => header(to, entry, b'5', 0, Path::new(""))?,
            (Node::Symlink(target), None) => header(to, entry, b'2', 0, target)?,
            (Node::Fifo, None) => header(to, entry, b'6', 0, Path::new(""))?,
            (Node::CharDevice(..), None) => header(to, entry, b'3', 0, Path::new(""))?,
            (Node::BlockDevice(..), None) => header(to, entry, b'4', 0, Path::new(""))?,
        }
        if entry.link() > 0 {
            firsts.entry(entry.link()).or_insert_with(|| entry.path.clone());
        }
    }
    end(to)
}

/// Writes a file of its own.
pub(crate) fn file(to: &mut dyn Write, path: &str, from: &mut dyn Read, size: u64) -> io::Result<()> {
    let meta = Meta { mode: 0o644, ..Meta::default() };
    let entry = Entry { path: path.into(), meta, node: Node::Fifo };
    header(to, &entry, b'0', size, Path::new(""))?;
    content(to, from, size)
}

/// Writes the end of an archive.
pub(crate) fn end(to: &mut dyn Write) -> io::Result<()> {
    to.write_all(&[0; 2 * 512])
}

fn content(to: &mut dyn Write, from: &mut dyn Read, size: u64) -> io::Result<()> {
    if io::copy(&mut from.take(size), to)? != size {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a content is shorter than its tree says"));
    }
    pad(to, size)
}

fn pad(to: &mut dyn Write, size: u64) -> io::Result<()> {
    let padding = size.next_multiple_of(BLOCK) - size;
    io::copy(&mut io::repeat(0).take(padding), to)?;
    Ok(())
}

fn header(to: &mut dyn Write, entry: &Entry, kind: u8, size: u64, link: &Path) -> io::Result<()> {
    let meta = &entry.meta;
    let mut path = entry.path.as_os_str().as_bytes().to_vec();
    if path.is_empty() {
        path = b".".to_vec();
    }
    if kind == b'5' {
        path.push(b'/');
    }
    let link = link.as_os_str().as_bytes();
    let mtime = u64::try_from(meta.mtime_unix_s).unwrap_or(0).min(OCTAL_MAX);
    let mut records = Vec::new();
    let mut record_if = |needed: bool, key: &[u8], value: &[u8]| {
        if needed {
            pax(&mut records, key, value);
        }
    };
    record_if(path.len() > 100, b"path", &path);
    record_if(link.len() > 100, b"linkpath", link);
    record_if(size > OCTAL_MAX, b"size", size.to_string().as_bytes());
    record_if(meta.uid > ID_MAX, b"uid", meta.uid.to_string().as_bytes());
    record_if(meta.gid > ID_MAX, b"gid", meta.gid.to_string().as_bytes());
    record_if(i64::try_from(mtime) != Ok(meta.mtime_unix_s), b"mtime", meta.mtime_unix_s.to_string().as_bytes());
    for (name, value) in &meta.xattrs {
        record_if(kind != b'1', &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    let (major, minor) = match entry.node {
        Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => (major, minor),
        _ => (0, 0),
    };
    if !records.is_empty() {
        to.write_all(&block(b"extended", 0o644, (0, 0), records.len() as u64, 0, b'x', b"", (0, 0)))?;
        to.write_all(&records)?;
        pad(to, records.len() as u64)?;
    }
    let ids = (meta.uid.min(ID_MAX), meta.gid.min(ID_MAX));
    to.write_all(&block(&path, meta.mode, ids, size.min(OCTAL_MAX), mtime, kind, link, (major, minor)))
}

#[allow(clippy::too_many_arguments)] // it is the list of a header's fields
fn block(
    path: &[u8],
    mode: u32,
    ids: (u32, u32),
    size: u64,
    mtime: u64,
    kind: u8,
    link: &[u8],
    device: (u32, u32),
) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, bytes: &[u8], max: usize| {
        let bytes = bytes.get(..bytes.len().min(max)).unwrap_or_default();
        if let Some(to) = block.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    };
    put(0, path, 100);
    put(100, format!("{mode:07o}").as_bytes(), 8);
    put(108, format!("{:07o}", ids.0).as_bytes(), 8);
    put(116, format!("{:07o}", ids.1).as_bytes(), 8);
    put(124, format!("{size:011o}").as_bytes(), 12);
    put(136, format!("{mtime:011o}").as_bytes(), 12);
    put(148, b"        ", 8);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    put(329, format!("{:07o}", device.0).as_bytes(), 8);
    put(337, format!("{:07o}", device.1).as_bytes(), 8);
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    if let Some(to) = block.get_mut(148..156) {
        to.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    block
}

/// Adds a record: its length counts its own digits.
fn pax(to: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + rest.to_string().len();
    if len.to_string().len() > rest.to_string().len() {
        len += 1;
    }
    to.extend(len.to_string().as_bytes());
    to.push(b' ');
    to.extend(key);
    to.push(b'=');
    to.extend(value);
    to.push(b'\n');
}
