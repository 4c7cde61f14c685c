//! Files that machines read from and that nobody may change: what each is known by is
//! kept beside it, and compared before anybody uses it.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Error, fsio};

/// What the name ends with of the file that says what another is known by.
pub(crate) const KNOWN_BY: &str = ".known";

/// Two machines that start at once may both find that a file was not pinned yet.
static NOTING: Mutex<()> = Mutex::new(());

/// In this many bytes a file is read; what is zero in one of them is as good as a hole.
const BLOCK: usize = 64 << 10;

/// What a file is known by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    size: u64,
    modified_s: i64,
    modified_ns: i64,
    inode: u64,
    /// Of what is in it.
    sha256: String,
}

impl Pin {
    fn is_of(&self, about: &fs::Metadata) -> bool {
        let seen = (about.len(), about.mtime(), about.mtime_nsec(), about.ino());
        seen == (self.size, self.modified_s, self.modified_ns, self.inode)
    }
}

fn place(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(KNOWN_BY);
    name.into()
}

/// Writes down what a file is known by from now on.
pub(crate) fn pin(path: &Path) -> Result<(), Error> {
    let (about, sha256) = content(path).map_err(Error::io("read", path))?;
    note(path, &about, sha256)
}

fn note(path: &Path, about: &fs::Metadata, sha256: String) -> Result<(), Error> {
    let (modified_s, modified_ns) = (about.mtime(), about.mtime_nsec());
    let pin = Pin { size: about.len(), modified_s, modified_ns, inode: about.ino(), sha256 };
    let known = place(path);
    let json = serde_json::to_vec(&pin).map_err(Error::io("describe", path))?;
    let _one_at_a_time = NOTING.lock().unwrap_or_else(PoisonError::into_inner);
    fsio::replace(&known, &json).map_err(Error::io("write", &known))
}

/// Refuses a file that is not as it was when it was pinned. One that was only moved, as with its
/// whole store, is found out by its content; one that an earlier version left is pinned as it is.
pub(crate) fn verify(path: &Path) -> Result<(), Error> {
    let known = place(path);
    let damaged = |path: &Path, reason: String| Error::DamagedPart { what: format!("`{}`", path.display()), reason };
    let json = match fs::read(&known) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return pin(path),
        other => other.map_err(Error::io("read", &known))?,
    };
    let pin: Pin = serde_json::from_slice(&json).map_err(|error| damaged(&known, error.to_string()))?;
    if pin.is_of(&fs::metadata(path).map_err(Error::io("look at", path))?) {
        return Ok(());
    }
    let (about, sha256) = content(path).map_err(Error::io("read", path))?;
    if sha256 != pin.sha256 || about.len() != pin.size {
        let reason = "its content was changed since it was made, and machines that read it would break: restore it, \
                      or remove it and what was made on it";
        return Err(damaged(path, reason.to_owned()));
    }
    tracing::info!(path = %path.display(), "is another file than before, with the same content");
    note(path, &about, sha256)
}

/// What a file is like, and the digest of what is in it. Holes cost no time.
fn content(path: &Path) -> io::Result<(fs::Metadata, String)> {
    let mut file = File::open(path)?;
    let about = file.metadata()?;
    let (mut hash, mut block, mut at) = (Sha256::new(), vec![0; BLOCK], 0);
    loop {
        let data = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => break,
            // Source: lseek(2): a file system that knows no holes says so.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        at = data - data % BLOCK as u64;
        file.seek(SeekFrom::Start(at))?;
        let mut got = 0;
        while got < BLOCK {
            match file.read(block.get_mut(got..).unwrap_or_default())? {
                0 => break,
                more => got += more,
            }
        }
        let there = block.get(..got).unwrap_or_default();
        if there.is_empty() {
            break;
        }
        if there.iter().any(|&byte| byte != 0) {
            hash.update(at.to_le_bytes());
            hash.update(there);
        }
        at += BLOCK as u64;
    }
    let digest = hash.finalize();
    Ok((about, digest.iter().map(|byte| format!("{byte:02x}")).collect()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// A file with a hole in it, pinned.
    fn pinned(dir: &Path) -> PathBuf {
        let path = dir.join("base");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", 3 << 20).unwrap();
        pin(&path).unwrap();
        path
    }

    fn refused(path: &Path) -> String {
        verify(path).unwrap_err().to_string()
    }

    #[test]
    fn a_file_whose_content_was_changed_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = pinned(dir.path());
        verify(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        for (at, byte) in [(0, b"B"), (1 << 20, b"x"), (3 << 20, b"E")] {
            let mut before = [0];
            File::open(&path).unwrap().read_exact_at(&mut before, at).unwrap();
            file.write_all_at(byte, at).unwrap();
            let error = refused(&path);
            assert!(error.contains(&path.display().to_string()) && error.contains("was changed since"), "{error}");
            // As it was: the time of its change does not count.
            file.write_all_at(&before, at).unwrap();
            verify(&path).unwrap();
        }
        file.set_len(5).unwrap();
        assert!(refused(&path).contains("was changed since"));
        fs::remove_file(&path).unwrap();
        assert!(refused(&path).contains("look at"));
    }

    #[test]
    fn several_can_find_at_once_that_a_file_is_not_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let path = pinned(dir.path());
        for _ in 0..50 {
            fs::remove_file(place(&path)).unwrap();
            std::thread::scope(|scope| {
                let found: Vec<_> = (0..4).map(|_| scope.spawn(|| verify(&path))).collect();
                for found in found {
                    found.join().unwrap().unwrap();
                }
            });
        }
    }

    #[test]
    fn a_file_that_was_copied_with_its_store_is_known_by_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = pinned(dir.path());
        let copy = dir.path().join("copy");
        fs::copy(&path, &copy).unwrap();
        fs::rename(place(&path), place(&copy)).unwrap();
        let before = fs::read(place(&copy)).unwrap();
        verify(&copy).unwrap();
        assert_ne!(fs::read(place(&copy)).unwrap(), before, "from now on it is known at a glance");
        fs::write(place(&copy), "no such thing").unwrap();
        assert!(refused(&copy).contains(".known` is damaged"), "{}", refused(&copy));
    }
}
