//! The first cluster of a qcow2 file. Everything in it may be a lie: a desktop
//! may have written the file, so each number is held against the format's
//! limits and the file's length before anything is made of it.
//!
//! Source of names, places and limits: QEMU `docs/interop/qcow2.txt` and `block/qcow2.h`.

use std::{fs::File, io};

use super::Fault;
use crate::disk::DiskFormat;

/// `QFI` and 0xfb.
const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header, and the least of a version 3 one.
const LENGTH_V2: u32 = 72;
const LENGTH_V3: u32 = 104;
/// `MIN_CLUSTER_BITS` and `MAX_CLUSTER_BITS`.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// `QCOW_MAX_L1_SIZE` and `QCOW_MAX_REFTABLE_SIZE`, in bytes.
pub(super) const L1_BYTES_MAX: u64 = 32 << 20;
pub(super) const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// `QCOW_MAX_SNAPSHOTS`.
const SNAPSHOTS_MAX: u32 = 65_536;
/// Longest name of a backing file.
pub(super) const BACKING_NAME_MAX: usize = 1023;
/// `BDRV_MAX_LENGTH`, rounded down: the largest disk that QEMU takes, in bytes.
pub(super) const SIZE_MAX: u64 = i64::MAX as u64 & !((1 << 21) - 1);
/// What most headers fit in, in bytes; the rest is read when it is needed.
const FIRST_READ: usize = 4096;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_SUBCLUSTERS: u64 = 1 << 4;
const AUTOCLEAR_BITMAPS: u64 = 1;

const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// What the header of a qcow2 file says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Two to this power is the size of a cluster in bytes.
    pub cluster_bits: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Where the disk shows what is not in this file.
    pub backing: Option<BackingName>,
    /// How many entries the first-level table has.
    pub l1_entries: u32,
    /// Where it is.
    pub l1_offset: u64,
    /// Where the table of reference counts is.
    pub reftable_offset: u64,
    /// How many clusters that has.
    pub reftable_clusters: u32,
    /// Two to this power is the size of a reference count in bits.
    pub refcount_order: u32,
    /// How many snapshots are inside.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// It was not closed, and its reference counts are to be made anew.
    pub dirty: bool,
    /// A program found it damaged and said so.
    pub corrupt: bool,
    /// It has bitmaps of changed blocks.
    pub bitmaps: bool,
    /// Length of the fixed part of the header in bytes.
    pub length: u32,
}

/// What a qcow2 file says about the file behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Its name, as written: nothing is made of it but by a [`BackingPolicy`](super::BackingPolicy).
    pub name: String,
    /// Its format, when it is written: without it, whoever opens it guesses.
    pub format: Option<String>,
}

impl Header {
    /// Reads and checks the header of an open file.
    ///
    /// # Errors
    /// The file cannot be read; inside, what is wrong with its header.
    pub(super) fn read(file: &File) -> io::Result<Result<Self, Fault>> {
        let length = super::length_of(file)?;
        let mut bytes = read_up_to(file, FIRST_READ)?;
        if let Ok(bits) = u32_at(&bytes, 20, "the header")
            && CLUSTER_BITS.contains(&bits)
        {
            let cluster = 1_usize << bits;
            bytes.truncate(cluster);
            match Self::parse(&bytes, length) {
                // The rest of the cluster may have it.
                Err(Fault::Truncated { .. }) if cluster > FIRST_READ => bytes = read_up_to(file, cluster)?,
                done => return Ok(done),
            }
        }
        Ok(Self::parse(&bytes, length))
    }

    /// Checks the first bytes of a file that is `file_length` bytes long; its
    /// first cluster holds everything that is looked at.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn parse(bytes: &[u8], file_length: u64) -> Result<Self, Fault> {
        let u32_at = |at| u32_at(bytes, at, "the header");
        let u64_at = |at| u64_at(bytes, at, "the header");
        if u32_at(0).map_err(|_| Fault::Magic)? != MAGIC {
            return Err(Fault::Magic);
        }
        let version = u32_at(4)?;
        field("version", 4, version, matches!(version, 2 | 3), "only 2 and 3 are known")?;
        let cluster_bits = u32_at(20)?;
        field("cluster_bits", 20, cluster_bits, CLUSTER_BITS.contains(&cluster_bits), "it has to be 9 to 21")?;
        let cluster = 1_u64 << cluster_bits;
        let aligned = |offset: u64| offset != 0 && offset.is_multiple_of(cluster);
        let crypt = u32_at(32)?;
        if crypt != 0 {
            return Err(unsupported("encrypted clusters", "crypt_method at byte 32", "cannot be read"));
        }
        let (order, length) = if version == 2 { (4, LENGTH_V2) } else { (u32_at(96)?, u32_at(100)?) };
        field("refcount_order", 96, order, order <= 6, "it has to be 0 to 6")?;
        let fits = version == 2 || (length >= LENGTH_V3 && length.is_multiple_of(8) && u64::from(length) <= cluster);
        field("header_length", 100, length, fits, "it has to be a multiple of 8, at least 104, and within a cluster")?;
        let (incompatible, autoclear) = if version == 2 { (0, 0) } else { (u64_at(72)?, u64_at(88)?) };
        refuse_features(incompatible)?;

        let size = u64_at(24)?;
        field("size", 24, size, size <= SIZE_MAX, "no disk is larger than 8 EiB")?;
        let (l1_entries, l1_offset) = (u32_at(36)?, u64_at(40)?);
        let l1_bytes = u64::from(l1_entries) * 8;
        field("l1_size", 36, l1_entries, l1_bytes <= L1_BYTES_MAX, "a first-level table has at most 32 MiB")?;
        let needed = l1_entries_for(size, cluster_bits);
        field("l1_size", 36, l1_entries, u64::from(l1_entries) >= needed, "the disk's size needs more entries")?;
        if l1_entries > 0 {
            field("l1_table_offset", 40, l1_offset, aligned(l1_offset), "it has to be a multiple of the cluster size")?;
            let inside = l1_offset.checked_add(l1_bytes).is_some_and(|end| end <= file_length);
            field("l1_table_offset", 40, l1_offset, inside, "the first-level table would not be inside of the file")?;
        }

        let (reftable_offset, reftable_clusters) = (u64_at(48)?, u32_at(56)?);
        let table = u64::from(reftable_clusters) << cluster_bits;
        let fits = reftable_clusters > 0 && table <= REFTABLE_BYTES_MAX;
        field(
            "refcount_table_clusters",
            56,
            reftable_clusters,
            fits,
            "the table has at least a cluster, and at most 8 MiB",
        )?;
        let rule = "it has to be a multiple of the cluster size";
        field("refcount_table_offset", 48, reftable_offset, aligned(reftable_offset), rule)?;
        let inside = reftable_offset < file_length && reftable_offset.checked_add(table).is_some();
        field("refcount_table_offset", 48, reftable_offset, inside, "the table would not be inside of the file")?;

        let (snapshots, snapshots_offset) = (u32_at(60)?, u64_at(64)?);
        field("nb_snapshots", 60, snapshots, snapshots <= SNAPSHOTS_MAX, "there are at most 65536")?;
        if snapshots > 0 {
            let fits = aligned(snapshots_offset) && snapshots_offset < file_length;
            field("snapshots_offset", 64, snapshots_offset, fits, "their table would not be inside of the file")?;
        }

        let found = Extensions::parse(bytes, length, cluster)?;
        let backing = match backing_name(bytes, length, cluster)? {
            Some(name) => Some(BackingName { name, format: found.backing_format }),
            None => None,
        };
        Ok(Self {
            version,
            cluster_bits,
            size,
            backing,
            l1_entries,
            l1_offset,
            reftable_offset,
            reftable_clusters,
            refcount_order: order,
            snapshots,
            snapshots_offset,
            dirty: incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
            bitmaps: found.bitmaps && autoclear & AUTOCLEAR_BITMAPS != 0,
            length,
        })
    }

    /// Size of a cluster in bytes.
    #[must_use]
    pub const fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many entries a second-level table has.
    pub(super) const fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// Writes the header of a new file: everything that its first cluster holds.
    ///
    /// # Errors
    /// The backing file's name is too long.
    pub(super) fn encode(&self) -> Result<Vec<u8>, Fault> {
        let mut out = Vec::with_capacity(512);
        let put32 = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_be_bytes());
        let put64 = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_be_bytes());
        put32(&mut out, MAGIC);
        put32(&mut out, self.version);
        // Name and length of the backing file: known below.
        out.extend_from_slice(&[0; 12]);
        put32(&mut out, self.cluster_bits);
        put64(&mut out, self.size);
        put32(&mut out, 0);
        put32(&mut out, self.l1_entries);
        put64(&mut out, self.l1_offset);
        put64(&mut out, self.reftable_offset);
        put32(&mut out, self.reftable_clusters);
        put32(&mut out, self.snapshots);
        put64(&mut out, self.snapshots_offset);
        if self.version == 3 {
            out.extend_from_slice(&[0; 24]);
            put32(&mut out, self.refcount_order);
            put32(&mut out, self.length);
            out.resize(self.length as usize, 0);
        }
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            put32(&mut out, EXTENSION_BACKING_FORMAT);
            put32(&mut out, u32::try_from(format.len()).unwrap_or(u32::MAX));
            out.extend_from_slice(format.as_bytes());
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend_from_slice(&[0; 8]);
        if let Some(backing) = &self.backing {
            let (at, name) = (out.len(), backing.name.as_bytes());
            if name.len() > BACKING_NAME_MAX || (at + name.len()) as u64 > self.cluster() {
                let why = format!("has a name of {} bytes, too long for a header", name.len());
                return Err(Fault::Backing { name: backing.name.clone(), why });
            }
            out.extend_from_slice(name);
            let place: Vec<u8> = (at as u64)
                .to_be_bytes()
                .into_iter()
                .chain(u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes())
                .collect();
            out.splice(8..20, place);
        }
        Ok(out)
    }

    /// The header in `first`, the file's first cluster, with another file
    /// behind it: its beginning up to the end of its extensions, and the name,
    /// which has a place where the old one is not, if there is one.
    ///
    /// # Errors
    /// The name is too long.
    pub(super) fn with_backing(first: &[u8], length: u32, backing: Option<&BackingName>) -> Result<Rewritten, Fault> {
        const PART: &str = "the header's extensions";
        let cluster = first.len() as u64;
        let (old_at, old_size) = (u64_at(first, 8, PART)?, u32_at(first, 16, PART)?);
        let old_end = if old_at == 0 { 0 } else { old_at + u64::from(old_size) };
        let mut head = slice(first, 0, u64::from(length), PART)?.to_vec();
        let mut add = |kind: u32, data: &[u8]| {
            head.extend(kind.to_be_bytes());
            head.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            head.extend(data);
            head.resize(head.len().next_multiple_of(8), 0);
        };
        if let Some(format) = backing.and_then(|backing| backing.format.as_ref()) {
            add(EXTENSION_BACKING_FORMAT, format.as_bytes());
        }
        // The others stay, known or not.
        let (mut at, end) = (u64::from(length), if old_at == 0 { cluster } else { old_at.min(cluster) });
        while at + 8 <= end {
            let (kind, size) = (u32_at(first, at, PART)?, u32_at(first, at + 4, PART)?);
            if kind == EXTENSION_END {
                break;
            }
            if kind != EXTENSION_BACKING_FORMAT {
                add(kind, slice(first, at + 8, u64::from(size), PART)?);
            }
            at = (at + 8 + u64::from(size)).next_multiple_of(8);
        }
        add(EXTENSION_END, &[]);
        let Some(backing) = backing else {
            head.splice(8..20, [0; 12]);
            return Ok((head, None));
        };
        let (name, begin) = (backing.name.as_bytes(), head.len() as u64);
        let size = name.len() as u64;
        let behind = begin.max(old_end.next_multiple_of(8));
        let at = if begin + size > old_at && behind + size <= cluster { behind } else { begin };
        if name.len() > BACKING_NAME_MAX || at + size > cluster {
            let why = format!("has a name of {size} bytes, too long for a header");
            return Err(Fault::Backing { name: backing.name.clone(), why });
        }
        let mut place = at.to_be_bytes().to_vec();
        place.extend(u32::try_from(size).unwrap_or(u32::MAX).to_be_bytes());
        head.splice(8..20, place);
        Ok((head, Some((at, name.to_vec()))))
    }

    /// A header without snapshots or features, whose tables are somewhere else still.
    pub(super) const fn plain(size: u64, cluster_bits: u32, backing: Option<BackingName>) -> Self {
        Self {
            version: 3,
            cluster_bits,
            size,
            backing,
            l1_entries: 0,
            l1_offset: 0,
            reftable_offset: 0,
            reftable_clusters: 0,
            refcount_order: 4,
            snapshots: 0,
            snapshots_offset: 0,
            dirty: false,
            corrupt: false,
            bitmaps: false,
            length: LENGTH_V3,
        }
    }
}

/// The beginning of a header, and where what name of a backing file goes.
pub(super) type Rewritten = (Vec<u8>, Option<(u64, Vec<u8>)>);

impl BackingName {
    pub(super) fn new(name: String, format: DiskFormat) -> Self {
        Self { name, format: Some(format.name().to_owned()) }
    }
}

/// How many first-level entries a disk of so many bytes needs.
pub(super) const fn l1_entries_for(size: u64, cluster_bits: u32) -> u64 {
    // A second-level table covers clusters times entries of eight bytes.
    size.div_ceil(1 << (2 * cluster_bits - 3))
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    bitmaps: bool,
}

impl Extensions {
    fn parse(bytes: &[u8], length: u32, cluster: u64) -> Result<Self, Fault> {
        const PART: &str = "the header's extensions";
        let mut found = Self::default();
        // They end where the name of the backing file begins, or the cluster.
        let name_at = u64_at(bytes, 8, PART)?;
        let end = if name_at == 0 { cluster } else { name_at.min(cluster) };
        let mut at = u64::from(length);
        while at + 8 <= end {
            let (kind, size) = (u32_at(bytes, at, PART)?, u32_at(bytes, at + 4, PART)?);
            if kind == EXTENSION_END {
                break;
            }
            let rule = "an extension would end behind the header";
            field(
                "an extension's length",
                u32::try_from(at + 4).unwrap_or(u32::MAX),
                size,
                at + 8 + u64::from(size) <= end,
                rule,
            )?;
            let data = slice(bytes, at + 8, u64::from(size), PART)?;
            match kind {
                EXTENSION_BACKING_FORMAT => found.backing_format = Some(String::from_utf8_lossy(data).into_owned()),
                EXTENSION_BITMAPS => found.bitmaps = true,
                EXTENSION_ENCRYPTION => {
                    return Err(unsupported("encrypted clusters", "extension 0x0537be77", "cannot be read"));
                }
                EXTENSION_DATA_FILE => return Err(data_file("extension 0x44415441")),
                // Whoever does not know one may leave it alone, says the format.
                _ => {}
            }
            at = (at + 8 + u64::from(size)).next_multiple_of(8);
        }
        Ok(found)
    }
}

fn backing_name(bytes: &[u8], length: u32, cluster: u64) -> Result<Option<String>, Fault> {
    const PART: &str = "the backing file's name";
    let (at, size) = (u64_at(bytes, 8, PART)?, u32_at(bytes, 16, PART)?);
    if at == 0 {
        return Ok(None);
    }
    let fits = (1..=BACKING_NAME_MAX).contains(&(size as usize));
    field("backing_file_size", 16, size, fits, "a name has 1 to 1023 bytes")?;
    let inside = at >= u64::from(length) && at.checked_add(u64::from(size)).is_some_and(|end| end <= cluster);
    field("backing_file_offset", 8, at, inside, "the name has to be in the first cluster, behind the header")?;
    let name = slice(bytes, at, u64::from(size), PART)?;
    match std::str::from_utf8(name) {
        Ok(name) if !name.contains('\0') => Ok(Some(name.to_owned())),
        _ => {
            let name = String::from_utf8_lossy(name).into_owned();
            Err(Fault::Backing { name, why: "is not text".to_owned() })
        }
    }
}

fn refuse_features(incompatible: u64) -> Result<(), Fault> {
    const PLACE: &str = "incompatible_features at byte 72";
    if incompatible & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(data_file(PLACE));
    }
    if incompatible & INCOMPATIBLE_COMPRESSION != 0 {
        return Err(unsupported("another compression than deflate", PLACE, "cannot be read"));
    }
    if incompatible & INCOMPATIBLE_SUBCLUSTERS != 0 {
        return Err(unsupported("second-level tables of subclusters", PLACE, "cannot be read"));
    }
    let unknown = incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    if unknown != 0 {
        return Err(unsupported(&format!("unknown features {unknown:#x}"), PLACE, "may mean anything"));
    }
    Ok(())
}

fn data_file(place: &'static str) -> Fault {
    unsupported("its data in another file", place, "could be any file of the host")
}

fn unsupported(what: &str, place: &'static str, consequence: &'static str) -> Fault {
    Fault::Feature { what: what.to_owned(), place, consequence }
}

fn field(name: &'static str, at: u32, value: impl Into<u64>, holds: bool, rule: &'static str) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault::Field { field: name, at, value: value.into(), rule }) }
}

fn slice<'a>(bytes: &'a [u8], at: u64, length: u64, part: &'static str) -> Result<&'a [u8], Fault> {
    let range = || Some(usize::try_from(at).ok()?..usize::try_from(at.checked_add(length)?).ok()?);
    let truncated = || Fault::Truncated { part, needed: at.saturating_add(length) };
    range().and_then(|range| bytes.get(range)).ok_or_else(truncated)
}

fn u32_at(bytes: &[u8], at: u64, part: &'static str) -> Result<u32, Fault> {
    let word = slice(bytes, at, 4, part)?;
    Ok(word.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
}

fn u64_at(bytes: &[u8], at: u64, part: &'static str) -> Result<u64, Fault> {
    let word = slice(bytes, at, 8, part)?;
    Ok(word.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// The first bytes of a file, fewer when it is shorter.
fn read_up_to(file: &File, most: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; most];
    let got = super::read_full(file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}
