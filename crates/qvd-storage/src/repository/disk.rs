//! Disks: images of block devices, cut into blocks of one length.
//!
//! Blocks have the length of a qcow2 cluster and stand where clusters stand:
//! what a guest wrote between two versions is what differs between them.
//! Blocks that were never written, or hold zeroes, are not kept.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use qvd_core::Digest;
use rustix::{fs::SeekFrom, io::Errno};

use super::{
    CommitId, Content, NewCommit, ObjectId, Repository, Staging,
    archive::{MAGIC, Qcow2, bad, check_ratio, refused_as},
};
use crate::{Error, fsio};

/// Length of a block in bytes: qcow2's usual cluster.
pub const DISK_BLOCK_BYTES: u32 = 64 << 10;
/// Largest disk in bytes: it bounds the list of its blocks.
pub const DISK_MAX_BYTES: u64 = 256 << 30;

const ID_BYTES: usize = 32;
/// What never was written, read as data.
static ZEROES: [u8; DISK_BLOCK_BYTES as usize] = [0; DISK_BLOCK_BYTES as usize];

impl Staging<'_> {
    /// Adds a disk: a qcow2 that stands alone, or else the plain content of the
    /// disk. The file may be hostile: nothing that it names is opened, and more
    /// than `max_bytes` of data are refused.
    ///
    /// # Errors
    /// [`Error::Import`] with what is refused and why.
    pub fn import_disk(&self, from: &Path, max_bytes: u64) -> Result<Content, Error> {
        let file = File::open(from).map_err(Error::io("open", from))?;
        let mut magic = [0; 4];
        let is_qcow2 = file.read_at(&mut magic, 0).is_ok_and(|len| len == 4) && magic == *MAGIC;
        let read = || if is_qcow2 { self.qcow2(&file, max_bytes) } else { self.raw(&file, max_bytes) };
        read().map_err(|error| refused_as(from, Error::io("read", from)(error)))
    }

    fn qcow2(&self, file: &File, max_bytes: u64) -> io::Result<Content> {
        let mut disk = Qcow2::open(file)?;
        let size_bytes = disk.size_bytes();
        let file_bytes = file.metadata()?.len();
        let mut data = 0;
        self.blocks(size_bytes, max_bytes, |at, block| {
            let until = disk.nothing_until(at);
            if until >= at + block.len() as u64 {
                return Ok(Next::Nothing(until));
            }
            let written = disk.read_at(at, block)?;
            data += if written { block.len() as u64 } else { 0 };
            check_ratio(file_bytes, data)?;
            Ok(if written { Next::Block } else { Next::Nothing(at + block.len() as u64) })
        })
    }

    fn raw(&self, file: &File, max_bytes: u64) -> io::Result<Content> {
        let size_bytes = file.metadata()?.len();
        let mut data_from = 0;
        self.blocks(size_bytes, max_bytes, |at, block| {
            if data_from <= at {
                data_from = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                    Ok(data) => data,
                    // All that follows is a hole.
                    Err(Errno::NXIO) => size_bytes,
                    Err(error) => return Err(error.into()),
                };
            }
            if data_from >= at + block.len() as u64 {
                return Ok(Next::Nothing(data_from));
            }
            file.read_exact_at(block, at)?;
            Ok(Next::Block)
        })
    }

    /// Adds a disk block by block; `read` fills one at an offset, or says until
    /// where there is nothing.
    fn blocks(
        &self,
        size_bytes: u64,
        max_bytes: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<Next>,
    ) -> io::Result<Content> {
        if size_bytes > DISK_MAX_BYTES || size_bytes == 0 {
            return Err(bad(format!("a disk of {size_bytes} bytes cannot be kept; at most {DISK_MAX_BYTES} can")));
        }
        let mut list: Vec<u8> = Vec::new();
        let mut buffer = ZEROES;
        let (mut at, mut data) = (0, 0_u64);
        while at < size_bytes {
            let len = usize::try_from(size_bytes - at).unwrap_or(usize::MAX).min(buffer.len());
            let block = buffer.get_mut(..len).unwrap_or_default();
            let next = match read(at, block)? {
                Next::Block if ZEROES.get(..len) == Some(&*block) => at + len as u64,
                Next::Nothing(until) => {
                    // Whole blocks only: what begins within one is read with it.
                    let blocks = (until.min(size_bytes) - at) / u64::from(DISK_BLOCK_BYTES);
                    at + (blocks * u64::from(DISK_BLOCK_BYTES)).max(len as u64)
                }
                Next::Block => {
                    data += len as u64;
                    if data > max_bytes {
                        return Err(bad(format!("it has more than the {max_bytes} bytes that are allowed")));
                    }
                    let (id, _) = self.put_bytes(block)?;
                    list.extend(id.map_or([0; ID_BYTES], |id| *id.digest().bytes()));
                    at += len as u64;
                    continue;
                }
            };
            let skipped = (next.min(size_bytes) - at).div_ceil(DISK_BLOCK_BYTES.into());
            list.resize(list.len() + usize::try_from(skipped).unwrap_or(0) * ID_BYTES, 0);
            at = next;
        }
        let (blocks, _) = self.put_bytes(&list)?;
        let blocks = blocks.ok_or_else(|| bad("it has no blocks"))?;
        Ok(Content::Disk { blocks, block_bytes: DISK_BLOCK_BYTES, size_bytes })
    }
}

/// What is at an offset of a disk.
enum Next {
    /// The block was filled.
    Block,
    /// There is nothing up to here.
    Nothing(u64),
}

impl Repository {
    /// Commits a disk as the next version of its flavour: see
    /// [`Repository::commit_tree`].
    ///
    /// # Errors
    /// As [`Repository::commit_tree`].
    pub fn commit_disk(&self, staging: &Staging<'_>, disk: Content, new: NewCommit) -> Result<CommitId, Error> {
        staging.settle()?;
        self.commit_content(staging, disk, None, new)
    }

    /// Writes the disk of a commit as the plain file `to`, which must not be
    /// there: sparse, and sharing its blocks with the repository where the file
    /// system can. It is what a qcow2 overlay can stand on.
    ///
    /// # Errors
    /// The commit holds a tree or is refused by the policy, something is missing,
    /// or `to` cannot be written.
    pub fn materialise(&self, id: CommitId, to: &Path) -> Result<(), Error> {
        self.expect_trusted(id)?;
        let commit = self.commit(id)?;
        let Content::Disk { blocks, block_bytes, size_bytes } = commit.content else {
            return Err(Error::Refused("the commit holds a tree, not a disk".to_owned()));
        };
        let listed = self.disk_blocks(blocks)?;
        if listed.len() as u64 != size_bytes.div_ceil(block_bytes.into()) {
            let reason = "it does not go with the length of its disk".to_owned();
            return Err(Error::DamagedPart { what: format!("object {blocks}"), reason });
        }
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let write = || {
            let file = tempfile::NamedTempFile::new_in(parent)?;
            file.as_file().set_len(size_bytes)?;
            let mut out = file.as_file();
            for (number, block) in listed.iter().enumerate() {
                let Some(block) = block else { continue };
                let at = number as u64 * u64::from(block_bytes);
                let from = File::open(self.objects.path(*block))?;
                // The standard library lets the kernel copy, which shares what it can.
                io::Seek::seek(&mut out, io::SeekFrom::Start(at))?;
                io::copy(&mut from.take(u64::from(block_bytes).min(size_bytes - at)), &mut out)?;
            }
            out.flush()?;
            out.sync_all()?;
            file.persist_noclobber(to).map_err(|error| error.error)?;
            fsio::sync_dir(&parent.canonicalize()?)
        };
        write().map_err(Error::io("write", to))
    }

    /// The blocks of a disk in order; none stands for one of zeroes.
    pub(crate) fn disk_blocks(&self, list: ObjectId) -> Result<Vec<Option<ObjectId>>, Error> {
        let mut bytes = Vec::new();
        let max = DISK_MAX_BYTES / u64::from(DISK_BLOCK_BYTES) * ID_BYTES as u64;
        let file = self.object(list)?;
        file.take(max + 1).read_to_end(&mut bytes).map_err(Error::io("read", self.objects.path(list)))?;
        if bytes.len() % ID_BYTES != 0 || bytes.len() as u64 > max {
            let reason = "it is no list of blocks".to_owned();
            return Err(Error::DamagedPart { what: format!("object {list}"), reason });
        }
        Ok(blocks(&bytes))
    }
}

/// The blocks that a list names; none stands for zeros.
pub(crate) fn blocks(list: &[u8]) -> Vec<Option<ObjectId>> {
    let id = |id: &[u8]| <[u8; ID_BYTES]>::try_from(id).ok().filter(|id| *id != [0; ID_BYTES]);
    list.chunks_exact(ID_BYTES).map(|block| id(block).map(|id| ObjectId::new(Digest::new(id)))).collect()
}
