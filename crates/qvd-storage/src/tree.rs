//! For tests: what is in a tree, as a digest that depends on nothing else.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use rustix::fs::{FileType, Mode, OFlags};
use sha2::{Digest as _, Sha256};

use crate::{Error, xattr::xattrs};

/// What is in a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// SHA-256 of the canonical listing.
    pub(crate) digest: [u8; 32],
    /// Files, directories, links and nodes, the root included.
    pub(crate) entries: u64,
    /// Entries of the root directory itself.
    pub(crate) top_entries: u64,
    /// Bytes of all regular files.
    pub(crate) size_bytes: u64,
}

/// Reads the whole tree. Two trees have the same digest exactly if a desktop
/// could not tell them apart: names, types, modes, owners, contents, link
/// targets, extended attributes and device numbers count; times and the
/// order on disk do not.
pub(crate) fn summarize(root: &Path) -> Result<Summary, Error> {
    let mut hash = Sha256::new();
    let mut summary = Summary { digest: [0; 32], entries: 0, top_entries: 0, size_bytes: 0 };
    for entry in walkdir::WalkDir::new(root).follow_links(false).same_file_system(true).sort_by_file_name() {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(root).to_path_buf();
            Error::io("read", path)(io::Error::from(error))
        })?;
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(path);
        summary.entries += 1;
        summary.top_entries += u64::from(entry.depth() == 1);
        summary.size_bytes += hash_entry(&mut hash, path, name).map_err(Error::io("read", path))?;
    }
    summary.digest = hash.finalize().into();
    Ok(summary)
}

/// Adds one entry to the listing and returns the bytes of its content.
fn hash_entry(hash: &mut Sha256, path: &Path, name: &Path) -> io::Result<u64> {
    let meta = std::fs::symlink_metadata(path)?;
    field(hash, name.as_os_str().as_bytes());
    for number in [meta.mode(), meta.uid(), meta.gid()] {
        field(hash, &number.to_le_bytes());
    }
    let mut size = 0;
    match FileType::from_raw_mode(meta.mode()) {
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
            let mut content = Sha256::new();
            size = copy(&mut file, &mut content)?;
            field(hash, &content.finalize());
        }
        FileType::Symlink => field(hash, std::fs::read_link(path)?.as_os_str().as_bytes()),
        FileType::CharacterDevice | FileType::BlockDevice => field(hash, &meta.rdev().to_le_bytes()),
        _ => {}
    }
    let mut attributes = xattrs(path)?;
    attributes.sort();
    field(hash, &(attributes.len() as u64).to_le_bytes());
    for (key, value) in attributes {
        field(hash, &key);
        field(hash, &value);
    }
    Ok(size)
}

/// Adds a field with its length in front, so that no two different lists of
/// fields are the same bytes.
fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn copy(from: &mut File, to: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(len) => {
                to.update(buffer.get(..len).unwrap_or_default());
                total += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/f"), "content").unwrap();
        std::os::unix::fs::symlink("d/f", dir.path().join("l")).unwrap();
        dir
    }

    fn digest(dir: &tempfile::TempDir) -> [u8; 32] {
        summarize(dir.path()).unwrap().digest
    }

    #[test]
    fn the_same_content_has_the_same_digest() {
        let (a, b) = (tree(), tree());
        let file = File::options().write(true).open(b.path().join("d/f")).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(digest(&a), digest(&b));
        let summary = summarize(a.path()).unwrap();
        assert_eq!((summary.entries, summary.top_entries, summary.size_bytes), (4, 2, 7));
    }

    #[test]
    fn every_property_counts() {
        type Change = fn(&Path);
        let changes: [(&str, Change); 7] = [
            ("content", |at| fs::write(at.join("d/f"), "Content").unwrap()),
            ("mode", |at| fs::set_permissions(at.join("d/f"), fs::Permissions::from_mode(0o4755)).unwrap()),
            ("name", |at| fs::rename(at.join("d/f"), at.join("d/g")).unwrap()),
            ("new file", |at| fs::write(at.join("n"), "").unwrap()),
            ("gone", |at| fs::remove_file(at.join("l")).unwrap()),
            ("link", |at| {
                fs::remove_file(at.join("l")).unwrap();
                std::os::unix::fs::symlink("d/g", at.join("l")).unwrap();
            }),
            ("attribute", |at| {
                rustix::fs::setxattr(at.join("d/f"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
            }),
        ];
        let before = digest(&tree());
        let mut seen = vec![before];
        for (what, change) in changes {
            let dir = tree();
            change(dir.path());
            let after = digest(&dir);
            assert!(!seen.contains(&after), "{what}");
            seen.push(after);
        }
    }
}
