//! Trees as one file that virtual machines read their system from.
//!
//! The file is an EROFS without compression and without data in its inodes:
//! only then can a guest map it as it is (DAX) and use the host's page cache,
//! which all guests of an image share, instead of keeping its own.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use qvd_core::Bytes;

use crate::{Error, fsio, program::Program};

const MAKER: Program = Program { name: "mkfs.erofs", package: "erofs-utils" };

/// How long it may take. Half a minute for a large desktop on a slow disk.
const MADE_WITHIN: Duration = Duration::from_secs(1800);

/// Length of the pages that memory of a guest is mapped in at best; persistent
/// memory has a multiple of it.
const ALIGNED: u64 = 2 << 20;

/// Where the superblock is, and what it begins with.
///
/// Source: Linux `fs/erofs/erofs_fs.h`.
const SUPER_AT: u64 = 1024;
const MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// Whether a file is such a base already.
///
/// # Errors
/// It cannot be read.
pub fn is_guest_base(file: &Path) -> Result<bool, Error> {
    let mut magic = [0; 4];
    let found = File::open(file).map_err(Error::io("open", file))?.read_at(&mut magic, SUPER_AT);
    Ok(found.map_err(Error::io("read", file))? == magic.len() && magic == MAGIC)
}

/// Writes the directory `from` as the file `to`, whole or not at all. Everybody
/// may read it: the process of a virtual machine, which is nobody on the host,
/// gets it as a descriptor. Keep it where nobody else can enter.
///
/// # Errors
/// [`Error::Unsupported`] without `mkfs.erofs`; or it could not be written.
pub fn make_guest_base(from: &Path, to: &Path) -> Result<Bytes, Error> {
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file =
        tempfile::Builder::new().prefix(".new-").tempfile_in(parent).map_err(Error::io("make a file in", parent))?;
    let from = &named(from)?;
    // Everything of a root is in it: also times, which programs compare.
    let arguments = ["--quiet".as_ref(), "-Enoinline_data".as_ref(), file.path().as_os_str(), from.as_os_str()];
    MAKER.run("make a guest's base", arguments, Stdio::null(), MADE_WITHIN)?;
    let finish = || {
        // Behind what was written: the maker may have replaced the file.
        let written = File::options().read(true).write(true).open(file.path())?;
        let size = written.metadata()?.len().next_multiple_of(ALIGNED);
        written.set_len(size)?;
        written.set_permissions(std::fs::Permissions::from_mode(0o444))?;
        written.sync_all()?;
        Ok::<_, std::io::Error>(size)
    };
    let size = finish().map_err(Error::io("finish", file.path()))?;
    file.persist(to).map_err(|error| Error::io("name", to)(error.error))?;
    fsio::sync_dir(parent).map_err(Error::io("sync", parent))?;
    Ok(Bytes::new(size))
}

/// The path of a directory that another program finds it by. What only a
/// descriptor leads to (`/proc/self/fd/7`) has none: the program would resolve
/// it to something else, as likely as not the host's own `/`.
fn named(dir: &Path) -> Result<PathBuf, Error> {
    let identity = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino()));
    let wanted = identity(dir).map_err(Error::io("open", dir))?;
    let path = dir.canonicalize().map_err(Error::io("open", dir))?;
    match identity(&path) {
        Ok(found) if found == wanted => Ok(path),
        _ => Err(Error::io("open", dir)(io::Error::new(io::ErrorKind::InvalidInput, "no path leads to it"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_becomes_a_file_that_is_aligned_readable_and_recognised() {
        if MAKER.find().is_none() {
            eprintln!("SKIPPED: mkfs.erofs is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (tree, base) = (dir.path().join("tree"), dir.path().join("base"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), "some content").unwrap();
        let size = make_guest_base(&tree, &base).unwrap();
        let about = std::fs::metadata(&base).unwrap();
        assert_eq!((about.len(), about.len() % ALIGNED), (size.get(), 0));
        assert_eq!(about.permissions().mode() & 0o777, 0o444);
        assert!(is_guest_base(&base).unwrap());
        assert!(!is_guest_base(&tree.join("file")).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn what_cannot_be_read_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        assert!(make_guest_base(&dir.path().join("absent"), &base).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
