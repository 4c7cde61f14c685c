//! One qcow2 file: where it has what of its disk.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{DecompressorOxide, decompress, inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
};

use super::{Fault, Header, length_of, read_full, read_padded, table::Tables};
use crate::Error;

/// The parts of an entry of a first- or second-level table.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
const L1_RESERVED: u64 = !(OFFSET | COPIED);

/// One qcow2 file without those behind it.
#[derive(Debug)]
pub struct Image {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) header: Header,
    /// Length of the file in bytes.
    pub(super) length: u64,
    pub(super) tables: Tables,
    /// No cluster before this one is free.
    pub(super) free_from: u64,
    /// The compressed cluster unpacked last, by its entry.
    unpacked: Option<(u64, Vec<u8>)>,
}

/// What a qcow2 file has of a part of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mapping {
    /// Nothing: the file behind it shows, or zeros.
    Absent,
    /// Zeros, whatever is behind.
    Zero,
    /// Data, from this byte of the file on.
    Data(u64),
    /// A cluster, packed as this entry says.
    Compressed(u64),
}

impl Image {
    /// Reads the header of an open file, which `path` names in errors.
    ///
    /// # Errors
    /// [`Error::DiskFile`] with what is wrong with it.
    pub fn open(file: File, path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let header = Header::read(&file).map_err(Error::io("read disk", &path))?;
        let header = header.map_err(|fault| Error::DiskFile { path: path.clone(), fault })?;
        let length = length_of(&file).map_err(Error::io("read disk", &path))?;
        Ok(Self { tables: Tables::new(header.cluster()), file, path, header, length, free_from: 1, unpacked: None })
    }

    /// What its header says.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The file, as errors name it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it has at byte `at` of the disk, and for how many bytes from there
    /// on it is the same; `at` is inside of the disk.
    ///
    /// # Errors
    /// A table cannot be read, or holds what cannot be right.
    pub fn map(&mut self, at: u64) -> Result<(Mapping, u64), Error> {
        let cluster = self.header.cluster();
        let (first, within) = (at / cluster, at % cluster);
        let left = self.header.size.saturating_sub(at);
        if left == 0 {
            return Err(self.refuse(Fault::Outside { from: at, to: at, size: self.header.size }));
        }
        let entries = self.header.l2_entries();
        let Some(table) = self.l2_table(first / entries)? else {
            // All that the missing table would say.
            let covered = (entries - first % entries) * cluster - within;
            return Ok((Mapping::Absent, covered.min(left)));
        };
        let begin = self.mapping(table, first % entries)?;
        let mut run = 1;
        while first % entries + run < entries && run * cluster < left.saturating_add(within) {
            let next = self.mapping(table, first % entries + run)?;
            let same = match (begin, next) {
                (Mapping::Data(from), Mapping::Data(to)) => to == from + run * cluster,
                (Mapping::Compressed(_), _) => false,
                (begin, next) => begin == next,
            };
            if !same {
                break;
            }
            run += 1;
        }
        let begin = match begin {
            Mapping::Data(from) => Mapping::Data(from + within),
            other => other,
        };
        Ok((begin, (run * cluster - within).min(left)))
    }

    /// Reads what [`Image::map`] said is here: `buffer` is inside of that run,
    /// and `at` is where it begins in the disk.
    pub(super) fn read_mapped(&mut self, mapping: Mapping, buffer: &mut [u8], at: u64) -> Result<(), Error> {
        match mapping {
            Mapping::Absent | Mapping::Zero => buffer.fill(0),
            Mapping::Data(from) => {
                read_padded(&self.file, buffer, from).map_err(Error::io("read disk", &self.path))?;
            }
            Mapping::Compressed(entry) => {
                let within = usize::try_from(at % self.header.cluster()).unwrap_or(usize::MAX);
                let unpacked = self.unpack(entry)?;
                if let Some(part) = unpacked.get(within..).and_then(|rest| rest.get(..buffer.len())) {
                    buffer.copy_from_slice(part);
                }
            }
        }
        Ok(())
    }

    /// Where the second-level table `index` is, if there is one.
    pub(super) fn l2_table(&mut self, index: u64) -> Result<Option<u64>, Error> {
        let entry = self.tables.get(&self.file, self.header.l1_offset, index);
        let entry = entry.map_err(Error::io("read disk", &self.path))?;
        self.l2_offset(entry, index).map_err(|fault| self.refuse(fault))
    }

    /// What an entry of the first-level table points to.
    pub(super) fn l2_offset(&self, entry: u64, index: u64) -> Result<Option<u64>, Fault> {
        let rule = if entry & L1_RESERVED != 0 {
            "it has bits that mean nothing"
        } else {
            match entry & OFFSET {
                0 => return Ok(None),
                offset => match self.pointer_rule(offset) {
                    None => return Ok(Some(offset)),
                    Some(rule) => rule,
                },
            }
        };
        Err(Fault::pointer(format!("the first-level table at byte {:#x}", self.header.l1_offset), index, entry, rule))
    }

    fn mapping(&mut self, table: u64, index: u64) -> Result<Mapping, Error> {
        let entry = self.tables.get(&self.file, table, index).map_err(Error::io("read disk", &self.path))?;
        self.mapping_of(entry, table, index).map_err(|fault| self.refuse(fault))
    }

    /// What an entry of a second-level table says.
    pub(super) fn mapping_of(&self, entry: u64, table: u64, index: u64) -> Result<Mapping, Fault> {
        let refuse =
            |rule| Err(Fault::pointer(format!("the second-level table at byte {table:#x}"), index, entry, rule));
        if entry & COMPRESSED != 0 {
            let (at, _) = self.packed(entry);
            return match at {
                _ if entry & COPIED != 0 => refuse("a compressed cluster cannot be marked as used once"),
                at if at < self.header.cluster() || at >= self.length => {
                    refuse("the cluster is not inside of the file")
                }
                _ => Ok(Mapping::Compressed(entry)),
            };
        }
        let zero = if self.header.version > 2 { ZERO } else { 0 };
        if entry & !(OFFSET | COPIED | zero) != 0 {
            return refuse("it has bits that mean nothing");
        }
        let offset = entry & OFFSET;
        if offset != 0
            && let Some(rule) = self.pointer_rule(offset)
        {
            return refuse(rule);
        }
        Ok(match (entry & zero != 0, offset) {
            (true, _) => Mapping::Zero,
            (false, 0) => Mapping::Absent,
            (false, offset) => Mapping::Data(offset),
        })
    }

    /// What a pointer to a cluster breaks, if anything.
    pub(super) fn pointer_rule(&self, offset: u64) -> Option<&'static str> {
        if !offset.is_multiple_of(self.header.cluster()) {
            Some("it does not point to a cluster's beginning")
        } else if offset < self.header.cluster() {
            Some("it points to the header")
        } else if offset >= self.length {
            Some("it points behind the file's end")
        } else {
            None
        }
    }

    /// Where a compressed cluster begins in the file, and how many bytes it may have.
    pub(super) const fn packed(&self, entry: u64) -> (u64, u64) {
        // Source: QEMU `docs/interop/qcow2.txt`, "Compressed Clusters Descriptor".
        let shift = 62 - (self.header.cluster_bits - 8);
        let at = entry & ((1 << shift) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> shift;
        (at, (sectors + 1) * 512 - at % 512)
    }

    fn unpack(&mut self, entry: u64) -> Result<&[u8], Error> {
        if self.unpacked.as_ref().is_none_or(|(kept, _)| *kept != entry) {
            let (at, length) = self.packed(entry);
            // At most as long as a cluster and a sector, by the format of an entry.
            let mut packed = vec![0; usize::try_from(length).unwrap_or(0)];
            let got = read_full(&self.file, &mut packed, at).map_err(Error::io("read disk", &self.path))?;
            packed.truncate(got);
            let mut plain = vec![0; usize::try_from(self.header.cluster()).unwrap_or(0)];
            let mut inflate = Box::<DecompressorOxide>::default();
            let (status, _, made) =
                decompress(&mut inflate, &packed, &mut plain, 0, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF);
            // What follows in the last sector belongs to the next cluster.
            if !matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) || made != plain.len() {
                return Err(self.refuse(Fault::Compressed { at }));
            }
            self.unpacked = Some((entry, plain));
        }
        Ok(self.unpacked.as_ref().map_or(&[], |(_, plain)| plain))
    }

    pub(super) fn refuse(&self, fault: Fault) -> Error {
        Error::DiskFile { path: self.path.clone(), fault }
    }
}
