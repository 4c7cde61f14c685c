//! Everything that can be known of a tree, to compare it with another.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, lgetxattr, llistxattr},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::report::{Failure, Step};

/// What is compared beside names, types, modes, owners, contents, numbers of
/// links and attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    /// Nothing more.
    Plain,
    /// Times of modification, as a copy keeps them.
    Times,
    /// Those, and the numbers of files and the times of change, which tell even
    /// that something was changed and changed back.
    Identity,
}

/// A tree, as a line of text for each entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest(BTreeMap<PathBuf, String>);

impl Manifest {
    pub(super) fn of(root: &Path, detail: Detail) -> Result<Self, Failure> {
        let mut found = BTreeMap::new();
        for entry in walkdir::WalkDir::new(root).follow_links(false).max_open(32) {
            let entry = entry.step("the tree can be read")?;
            let name = entry.path().strip_prefix(root).unwrap_or(entry.path()).to_path_buf();
            let line = describe(entry.path(), detail).step(format!("`/{}` can be read", name.display()))?;
            found.insert(name, line);
        }
        Ok(Self(found))
    }

    /// Only what is in the directory `name`, which stands for all of it.
    pub(super) fn below(mut self, name: &str) -> Self {
        self.0.retain(|path, _| path.starts_with(name));
        self
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for (path, line) in &self.0 {
            hash.update(path.as_os_str().as_bytes());
            hash.update([0]);
            hash.update(line);
            hash.update([0]);
        }
        hash.finalize().into()
    }

    /// Demands that `seen` is the same tree, and otherwise names what differs.
    pub(super) fn expect(&self, what: &str, seen: &Self) -> Result<(), Failure> {
        if self == seen {
            return Ok(());
        }
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        let mut paths: Vec<_> = self.0.keys().chain(seen.0.keys()).collect();
        paths.sort();
        paths.dedup();
        for path in paths {
            let (one, other) = (self.0.get(path), seen.0.get(path));
            if one != other {
                let line = |line: Option<&String>| format!("`/{}` {}", path.display(), line.map_or("absent", |l| l));
                expected.push(line(one));
                got.push(line(other));
            }
        }
        let text = |digest: [u8; 32], lines: &[String]| {
            let some = lines.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
            format!("digest {}: {some}{}", hex(&digest[..6]), if lines.len() > 3 { "; …" } else { "" })
        };
        Err(Failure::new(format!("{what}: {}", text(self.digest(), &expected)), text(seen.digest(), &got)))
    }
}

fn describe(path: &Path, detail: Detail) -> io::Result<String> {
    let meta = std::fs::symlink_metadata(path)?;
    let kind = FileType::from_raw_mode(meta.mode());
    let mut line = format!("{kind:?} {:o} {}:{}", meta.mode() & 0o7777, meta.uid(), meta.gid());
    match kind {
        FileType::RegularFile => {
            line.push_str(&format!(
                " links={} bytes={} sha256={}",
                meta.nlink(),
                meta.len(),
                hex(&content(path)?[..6])
            ));
        }
        FileType::Symlink => line.push_str(&format!(" to={}", std::fs::read_link(path)?.display())),
        FileType::CharacterDevice | FileType::BlockDevice => line.push_str(&format!(" device={:x}", meta.rdev())),
        _ => {}
    }
    for (name, value) in xattrs(path)? {
        line.push_str(&format!(" {name}={}", hex(&value)));
    }
    if detail != Detail::Plain {
        line.push_str(&format!(" modified={}.{:09}", meta.mtime(), meta.mtime_nsec()));
    }
    if detail == Detail::Identity {
        line.push_str(&format!(" inode={} changed={}.{:09}", meta.ino(), meta.ctime(), meta.ctime_nsec()));
    }
    Ok(line)
}

fn content(path: &Path) -> io::Result<[u8; 32]> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            len => hash.update(buffer.get(..len).unwrap_or_default()),
        }
    }
}

/// Attributes of a path, by name, but for those that stacking notes for itself.
fn xattrs(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 16 << 10];
    let len = match llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        len => len?,
    };
    names.truncate(len);
    let names = names.split(|byte| *byte == 0).filter_map(|name| str::from_utf8(name).ok());
    let ours = |name: &&str| !name.is_empty() && !name.starts_with("trusted.overlay.") && *name != "security.selinux";
    names.filter(ours).map(|name| Ok((name.to_owned(), xattr(path, name)?))).collect()
}

/// One attribute of a path.
pub(super) fn xattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 16 << 10];
    let len = lgetxattr(path, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
