//! Images from outside and to outside: directories, tar, OCI archives.

mod checkout;
mod decompress;
mod export;
mod layers;
mod oci;
mod qcow2;
mod tar;
mod write;

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

pub(crate) use decompress::check_ratio;
pub use export::Format;
pub(crate) use qcow2::{MAGIC, Qcow2};
pub(crate) use tar::bad;

use super::{Staging, Tree};
use crate::Error;
use layers::Layers;

/// Bytes that an archive may hold unless told otherwise: several times a large
/// desktop.
pub const IMPORT_MAX_BYTES: u64 = 64 << 30;

impl Staging<'_> {
    /// Adds what `from` holds and returns its tree: a directory, a tar archive
    /// with or without compression (gzip, xz, bzip2, zstd), or an OCI archive.
    /// What it is shows in the file itself, not in its name.
    ///
    /// The archive may be hostile: nothing is written but contents under their
    /// digest, memory is bounded, and more than `max_bytes` are refused.
    ///
    /// # Errors
    /// [`Error::Import`] with what is refused and why; then nothing of it is kept.
    pub fn import(&self, from: &Path, max_bytes: u64) -> Result<Tree, Error> {
        let meta = std::fs::metadata(from).map_err(Error::io("read", from))?;
        if meta.is_dir() {
            return self.scan_up_to(from, &|_| false, max_bytes);
        }
        let mut file = File::open(from).map_err(Error::io("open", from))?;
        self.import_archive(&mut file, max_bytes).map_err(|error| refused_as(from, error))
    }

    /// As [`Staging::import`], from an open archive.
    ///
    /// # Errors
    /// As [`Staging::import`].
    pub fn import_archive<F: Read + Seek>(&self, file: &mut F, max_bytes: u64) -> Result<Tree, Error> {
        let read = || -> io::Result<Vec<super::Entry>> {
            if oci::is_archive(decompress::open(&mut *file, max_bytes)?)? {
                file.rewind()?;
                return oci::read(self, file, max_bytes);
            }
            file.rewind()?;
            let mut layers = Layers::new(self);
            layers.add(decompress::open(file, max_bytes)?, false)?;
            Ok(layers.finish())
        };
        let entries = read().map_err(Error::io("read", "archive"))?;
        Ok(Tree::new(entries)?)
    }
}

/// What an archive without compression holds, which may be hostile.
pub(crate) fn unpack(staging: &Staging<'_>, from: impl Read) -> io::Result<Vec<super::Entry>> {
    let mut layers = Layers::new(staging);
    layers.add(from, false)?;
    Ok(layers.finish())
}

/// An error that is about what is in `from` says so.
pub(crate) fn refused_as(from: &Path, error: Error) -> Error {
    match error {
        Error::Io { source, .. } if refuses(&source) => {
            Error::Import { from: from.to_path_buf(), reason: source.to_string() }
        }
        Error::Tree(error) => Error::Import { from: from.to_path_buf(), reason: error.to_string() },
        other => other,
    }
}

/// Whether a file holds a disk, as far as its first bytes and its name say: a
/// qcow2, or the plain content of a disk.
///
/// # Errors
/// It cannot be read.
pub fn is_disk(from: &Path) -> io::Result<bool> {
    if std::fs::metadata(from)?.is_dir() {
        return Ok(false);
    }
    let mut start = Vec::new();
    File::open(from)?.take(512).read_to_end(&mut start)?;
    let named = from.extension().is_some_and(|name| ["raw", "img", "qcow2"].iter().any(|disk| name == *disk));
    Ok(named || start.starts_with(MAGIC.as_slice()))
}

/// Whether an error is about what is in a file, not about reading it.
fn refuses(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, Other, OutOfMemory, UnexpectedEof};
    error.raw_os_error().is_none()
        && matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof | Other | OutOfMemory)
}
