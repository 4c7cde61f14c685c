//! New qcow2 files: four small writes, whatever the size of the disk.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use super::{
    Fault,
    header::{BackingName, Header, L1_BYTES_MAX, l1_entries_for},
};
use crate::{Error, disk::DiskFormat};

/// 64 KiB, as everywhere: larger ones copy more at a first write, smaller ones
/// need more tables.
pub(super) const CLUSTER_BITS: u32 = 16;

/// Makes the file `path`, which must not be there yet: an empty disk of
/// `size` bytes that shows what is in the file behind it, named with its format.
/// Nothing is synced.
///
/// # Errors
/// It is there already or cannot be written; [`Error::DiskFile`] when the size
/// is not a multiple of 512 or too large, or the other file's name too long.
pub fn create(path: &Path, size: u64, backing: Option<(&Path, DiskFormat)>) -> Result<(), Error> {
    let file = File::options().write(true).create_new(true).open(path).map_err(Error::io("make disk", path))?;
    write_new(&file, path, size, backing)
}

/// As [`create`], into an empty file that is open.
pub(in crate::disk) fn write_new(
    file: &File,
    path: &Path,
    size: u64,
    backing: Option<(&Path, DiskFormat)>,
) -> Result<(), Error> {
    let refuse = |fault| Error::DiskFile { path: path.to_path_buf(), fault };
    let backing = match backing {
        None => None,
        Some((name, format)) => {
            let text = name.to_str().ok_or_else(|| {
                refuse(Fault::Backing { name: name.to_string_lossy().into_owned(), why: "is not text".to_owned() })
            })?;
            Some(BackingName::new(text.to_owned(), format))
        }
    };
    let layout = Layout::new(Header::plain(size, CLUSTER_BITS, backing)).map_err(refuse)?;
    layout.write(file).map_err(Error::io("make disk", path))
}

/// Where everything is in a new file: the header, the table of reference
/// counts, the counts, the first-level table; each from a cluster's beginning.
pub(super) struct Layout {
    header: Vec<u8>,
    cluster: u64,
    used: u64,
    length: u64,
}

impl Layout {
    pub(super) fn new(mut header: Header) -> Result<Self, Fault> {
        let cluster = header.cluster();
        if !header.size.is_multiple_of(512) {
            return Err(Fault::Limit(format!("a disk of {} bytes is not a whole number of sectors", header.size)));
        }
        let entries = l1_entries_for(header.size, header.cluster_bits);
        let l1_bytes = entries * 8;
        // Sixteen bits a count: one cluster of them has to do for a new file.
        let used = 3 + l1_bytes.div_ceil(cluster);
        if l1_bytes > L1_BYTES_MAX || used > cluster / 2 {
            return Err(Fault::Limit(format!("a disk of {} bytes is too large for a qcow2 file", header.size)));
        }
        header.reftable_offset = cluster;
        header.reftable_clusters = 1;
        header.l1_offset = 3 * cluster;
        header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
        Ok(Self { header: header.encode()?, cluster, used, length: used * cluster })
    }

    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        // The length first: each write behind a file's end is a transaction of its own, which XFS
        // has wait for what the file system does in the background.
        file.set_len(self.length)?;
        file.write_all_at(&(2 * self.cluster).to_be_bytes(), self.cluster)?;
        let counts: Vec<u8> = (0..self.used).flat_map(|_| 1_u16.to_be_bytes()).collect();
        file.write_all_at(&counts, 2 * self.cluster)?;
        file.write_all_at(&self.header, 0)
    }
}
