//! A tree as a directory of its own.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, lsetxattr, makedev,
    mknodat, utimensat,
};

use crate::{
    Error,
    copytree::Content as How,
    fsio,
    repository::{Entry, Node, Repository, Tree},
};

impl Repository {
    /// Writes a tree as the directory `to`, which must not be there: files
    /// share their blocks with the repository where the file system can. The
    /// directory is made beside and renamed when it is whole.
    pub(crate) fn checkout(&self, tree: &Tree, to: &Path) -> Result<(), Error> {
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Nobody else can get in: what is made there is what was made by us.
        let dir = tempfile::Builder::new().prefix(".checkout-").tempdir_in(parent);
        let dir = dir.map_err(Error::io("make a directory in", parent))?;
        let top = dir.path().join("tree");
        let mut firsts = HashMap::new();
        for entry in tree.entries() {
            self.make(&top, entry, &mut firsts).map_err(Error::io("write", to.join(&entry.path)))?;
        }
        // Directories last: what is made in one changes its time, and one that
        // cannot be written could not be filled.
        for entry in tree.entries().iter().rev().filter(|entry| matches!(entry.node, Node::Directory)) {
            dress(&below(&top, &entry.path), entry).map_err(Error::io("write", to.join(&entry.path)))?;
        }
        let publish = || {
            rustix::fs::syncfs(fsio::open_dir(dir.path())?)?;
            rustix::fs::renameat_with(CWD, &top, CWD, to, rustix::fs::RenameFlags::NOREPLACE)?;
            fsio::sync_dir(&parent.canonicalize()?)
        };
        publish().map_err(Error::io("write", to))
    }

    fn make(&self, top: &Path, entry: &Entry, firsts: &mut HashMap<u32, PathBuf>) -> io::Result<()> {
        let at = below(top, &entry.path);
        match &entry.node {
            Node::Directory => return fs::DirBuilder::new().mode(0o700).create(at),
            Node::File { link, .. } if firsts.contains_key(link) => {
                return firsts.get(link).map_or(Ok(()), |first| fs::hard_link(first, &at));
            }
            Node::File { object, size_bytes, link } => {
                let to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&at)?;
                if let Some(object) = object {
                    How::Cheapest.fill(&File::open(self.objects.path(*object))?, &to, *size_bytes)?;
                }
                if *link > 0 {
                    firsts.insert(*link, at.clone());
                }
            }
            Node::Symlink(target) => symlink(target, &at)?,
            Node::Fifo => mknodat(CWD, &at, FileType::Fifo, Mode::RUSR, 0)?,
            Node::Socket => mknodat(CWD, &at, FileType::Socket, Mode::RUSR, 0)?,
            Node::CharDevice(major, minor) => {
                mknodat(CWD, &at, FileType::CharacterDevice, Mode::RUSR, makedev(*major, *minor))?;
            }
            Node::BlockDevice(major, minor) => {
                mknodat(CWD, &at, FileType::BlockDevice, Mode::RUSR, makedev(*major, *minor))?;
            }
        }
        dress(&at, entry)
    }
}

/// Owner, mode, attributes and time, in this order: a change of owner takes
/// set-user-id bits and capabilities away.
fn dress(at: &Path, entry: &Entry) -> io::Result<()> {
    let meta = &entry.meta;
    let owner = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
    match chownat(CWD, at, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW) {
        // Who is not root gets a tree of their own files.
        Err(rustix::io::Errno::PERM) if !rustix::process::geteuid().is_root() => {}
        owned => owned?,
    }
    if !matches!(entry.node, Node::Symlink(_)) {
        chmodat(CWD, at, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
    }
    for (name, value) in &meta.xattrs {
        lsetxattr(at, name.as_slice(), value, XattrFlags::empty())?;
    }
    let time = Timespec { tv_sec: meta.mtime_unix_s, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, at, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Without a slash at the end for the root.
fn below(top: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { top.to_path_buf() } else { top.join(path) }
}
