//! Files in the qcow2 format, read and written in process.
//!
//! Whatever is in such a file may have been written by somebody hostile: each
//! number is checked before use, memory does not grow with what a file claims,
//! and the files behind one are opened only where a [`BackingPolicy`] allows it.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use qvd_storage::{DiskFormat, qcow2::{self, BackingPolicy, Chain}};
//!
//! let dir = tempfile::tempdir()?;
//! let (base, disk) = (dir.path().join("base"), dir.path().join("disk"));
//! std::fs::write(&base, vec![7; 1 << 20])?;
//! qcow2::create(&disk, 2 << 20, Some((&base, DiskFormat::Raw)))?;
//!
//! let policy = BackingPolicy::nothing().with_dir(dir.path())?;
//! let mut chain = Chain::open(&disk, DiskFormat::Qcow2, &policy)?;
//! let mut bytes = [1; 2];
//! chain.read_at(&mut bytes, (1 << 20) - 1)?;
//! assert_eq!(bytes, [7, 0]);
//! # Ok(())
//! # }
//! ```

mod chain;
mod change;
mod check;
mod counts;
mod create;
mod fault;
mod header;
mod image;
mod policy;
mod table;
mod write;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

pub(in crate::disk) use self::create::write_new;
pub use self::{
    chain::Chain,
    change::{Rebase, Shrink, commit, rebase, resize},
    check::{Repair, check},
    create::create,
    fault::Fault,
    header::{BackingName, Header},
    image::{Image, Mapping},
    policy::BackingPolicy,
    write::Writer,
};

/// How many bytes there are. A block device has no length, but an end.
fn length_of(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Fills `buffer` from the file; returns how much there was of it.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Fills `buffer` from the file, with zeros where that has ended.
fn read_padded(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let got = read_full(file, buffer, at)?;
    if let Some(rest) = buffer.get_mut(got..) {
        rest.fill(0);
    }
    Ok(())
}
