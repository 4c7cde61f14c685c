//! Reading qcow2 as hostile text: one file, no other one that it names, every
//! offset checked.
//!
//! Source of all offsets and flags: QEMU `docs/interop/qcow2.rst`.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use super::tar::bad;

pub(crate) const MAGIC: &[u8; 4] = b"QFI\xfb";
const HEADER_BYTES: usize = 112;
/// Bits of an entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeroes, whatever else the entry says (version 3).
const ZERO: u64 = 1;
/// Largest first-level table that is read, in bytes. Source: QEMU
/// `block/qcow2.h`, `QCOW_MAX_L1_SIZE`.
const L1_MAX_BYTES: u64 = 32 << 20;
/// Features that change nothing for who only reads: bit 0 says that reference
/// counts may be wrong, bit 3 that the way of compression is named.
const READABLE: u64 = 1 | 1 << 3;

/// A disk in a file.
#[derive(Debug)]
pub(crate) struct Qcow2<'f> {
    file: &'f File,
    version: u32,
    cluster_bits: u32,
    size_bytes: u64,
    zstd: bool,
    l1: Vec<u64>,
    /// The second-level table that was read last, and where it is.
    l2: (u64, Vec<u64>),
    /// The compressed cluster that was read last, by its entry.
    unpacked: (u64, Vec<u8>),
}

impl<'f> Qcow2<'f> {
    /// Reads the header and the first-level table.
    pub(crate) fn open(file: &'f File) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        let filled = read_some(file, &mut header, 0)?;
        if filled < 72 || !header.starts_with(MAGIC.as_slice()) {
            return Err(bad("it is no qcow2: its header is missing"));
        }
        let u32_at = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
        let u64_at = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        let version = u32_at(4);
        let (features, zstd) = match version {
            2 => (0, false),
            3 if filled >= 104 => (u64_at(72), u32_at(100) > 104 && header.get(104) == Some(&1)),
            _ => return Err(bad(format!("it is qcow2 of version {version}; 2 and 3 are known here"))),
        };
        if u64_at(8) != 0 || u32_at(16) != 0 {
            return Err(bad("it has a backing file; make a disk of its own with `qemu-img convert`"));
        }
        if u32_at(32) != 0 {
            return Err(bad("it is encrypted"));
        }
        if features & !READABLE != 0 {
            let what = if features & 4 != 0 { "has its data in another file" } else { "needs features unknown here" };
            return Err(bad(format!("it {what} ({features:#x})")));
        }
        let (cluster_bits, size_bytes) = (u32_at(20), u64_at(24));
        if !(9..=21).contains(&cluster_bits) {
            return Err(bad(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        let l1_entries = u64::from(u32_at(36));
        // Each covers a cluster full of entries of 8 bytes.
        let needed = size_bytes.div_ceil(1 << (2 * cluster_bits - 3));
        if l1_entries < needed || l1_entries * 8 > L1_MAX_BYTES {
            return Err(bad(format!("its table of {l1_entries} entries does not go with its {size_bytes} bytes")));
        }
        let l1 = table(file, u64_at(40), l1_entries)?;
        let (l2, unpacked) = ((0, Vec::new()), (0, Vec::new()));
        Ok(Self { file, version, cluster_bits, size_bytes, zstd, l1, l2, unpacked })
    }

    /// Length of the disk in bytes.
    pub(crate) const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Until where there is nothing from `at` on, as far as the first-level table
    /// tells; if it tells of something, that is `at`.
    pub(crate) fn nothing_until(&self, at: u64) -> u64 {
        // Each entry covers a cluster full of entries of 8 bytes.
        let covered = 1_u64 << (2 * self.cluster_bits - 3);
        let first = at / covered;
        let rest = self.l1.get(usize::try_from(first).unwrap_or(usize::MAX)..).unwrap_or_default();
        let empty = rest.iter().take_while(|entry| **entry & OFFSET == 0).count() as u64;
        ((first + empty) * covered).clamp(at, self.size_bytes.max(at))
    }

    /// Fills `to` with what is at `at`; says whether anything was ever written there.
    pub(crate) fn read_at(&mut self, mut at: u64, to: &mut [u8]) -> io::Result<bool> {
        let mut written = false;
        let cluster = 1_u64 << self.cluster_bits;
        let mut rest = to;
        while !rest.is_empty() {
            let within = at % cluster;
            let len = usize::try_from(cluster - within).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            written |= self.in_cluster(at, within, now)?;
            at += len as u64;
            rest = later;
        }
        Ok(written)
    }

    fn in_cluster(&mut self, at: u64, within: u64, to: &mut [u8]) -> io::Result<bool> {
        let entry = self.entry(at)?;
        if entry & COMPRESSED != 0 {
            self.unpack(entry)?;
            let start = usize::try_from(within).unwrap_or(usize::MAX);
            match self.unpacked.1.get(start..).and_then(|rest| rest.get(..to.len())) {
                Some(bytes) => to.copy_from_slice(bytes),
                None => return Err(bad(format!("the compressed cluster at {at} is too short"))),
            }
            return Ok(true);
        }
        let offset = entry & OFFSET;
        if offset == 0 || (self.version == 3 && entry & ZERO != 0) {
            to.fill(0);
            return Ok(false);
        }
        if !offset.is_multiple_of(1 << self.cluster_bits) {
            return Err(bad(format!("the cluster at {at} is not where one can be")));
        }
        // The last cluster of a file may be cut off: the rest is zeroes.
        let filled = read_some(self.file, to, offset + within)?;
        if filled == 0 {
            return Err(bad(format!("the cluster at {at} lies behind the end of the file")));
        }
        to.get_mut(filled..).unwrap_or_default().fill(0);
        Ok(true)
    }

    fn entry(&mut self, at: u64) -> io::Result<u64> {
        let number = at >> self.cluster_bits;
        let per_table = 1_u64 << (self.cluster_bits - 3);
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let l1 = self.l1.get(index(number / per_table)).copied().unwrap_or(0) & OFFSET;
        if l1 == 0 {
            return Ok(0);
        }
        if self.l2.0 != l1 {
            self.l2 = (l1, table(self.file, l1, per_table)?);
        }
        Ok(self.l2.1.get(index(number % per_table)).copied().unwrap_or(0))
    }

    fn unpack(&mut self, entry: u64) -> io::Result<()> {
        if self.unpacked.0 == entry {
            return Ok(());
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
        let len = usize::try_from(sectors * 512 - offset % 512).unwrap_or(usize::MAX);
        let mut packed = vec![0; len];
        let filled = read_some(self.file, &mut packed, offset)?;
        packed.truncate(filled);
        let mut bytes = Vec::new();
        let max = 1_u64 << self.cluster_bits;
        let unpacked = if self.zstd {
            zstd::stream::read::Decoder::new(packed.as_slice())?.single_frame().take(max).read_to_end(&mut bytes)
        } else {
            flate2::read::DeflateDecoder::new(packed.as_slice()).take(max).read_to_end(&mut bytes)
        };
        unpacked.map_err(|error| bad(format!("the compressed cluster in the file at {offset} is damaged: {error}")))?;
        self.unpacked = (entry, bytes);
        Ok(())
    }
}

/// Reads a table of big-endian entries.
fn table(file: &File, at: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; usize::try_from(entries * 8).unwrap_or(usize::MAX)];
    if read_some(file, &mut bytes, at)? < bytes.len() {
        return Err(bad(format!("the table at {at} lies behind the end of the file")));
    }
    Ok(bytes.chunks_exact(8).filter_map(|entry| entry.try_into().ok()).map(u64::from_be_bytes).collect())
}

/// Reads until the buffer is full or the file ends.
fn read_some(file: &File, to: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = to.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // An offset that no file can have is behind the end of this one.
        match file.read_at(rest, at.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
