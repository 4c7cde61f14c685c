//! Writing to the disk in a qcow2 file.
//!
//! What a reader sees changes entry by entry, after what an entry points to is
//! on storage. Counts may lag behind; that is said in the header before the first change,
//! so that whoever opens the file next makes them right, as QEMU does too.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use super::{
    BackingPolicy, Chain, Fault, Image, Repair,
    chain::{Layer, read_image},
    image::{COMPRESSED, COPIED, OFFSET, ZERO},
};
use crate::{
    Error,
    disk::{DiskFormat, lock},
};

/// How much is held in memory at a time, in bytes.
pub(super) const AT_ONCE: usize = 4 << 20;
/// After so many clusters that are to be given back, they are.
const FREED_AT_ONCE: usize = 4096;

/// A qcow2 file that is open for writing, with those behind it, of which
/// nothing is written. Nobody else has it meanwhile.
///
/// Dropped without [`Writer::finish`], or killed, it leaves a disk that has the
/// old or the new content in each cluster, and is put in order when it is opened next.
#[derive(Debug)]
pub struct Writer {
    pub(super) image: Image,
    pub(super) behind: Vec<Layer>,
    /// Entries that nothing has any more, whose clusters are counted still.
    freed: Vec<u64>,
}

impl Writer {
    /// Opens a disk, and every file behind it that `policy` allows. What
    /// somebody left who was killed is put in order.
    ///
    /// # Errors
    /// [`Error::DiskFileBusy`] while a virtual machine has it, [`Error::DiskFile`]
    /// when it contradicts itself, or something behind it is damaged or not permitted.
    pub fn open(path: &Path, policy: &BackingPolicy) -> Result<Self, Error> {
        Self::of(path, Some(policy))
    }

    /// As [`Writer::open`], without those behind it when nothing is said of them.
    pub(super) fn of(path: &Path, policy: Option<&BackingPolicy>) -> Result<Self, Error> {
        let file = File::options().read(true).write(true).open(path).map_err(Error::io("open disk", path))?;
        if !lock::claim(&file).map_err(Error::io("look who uses", path))? {
            return Err(Error::DiskFileBusy(path.to_path_buf()));
        }
        let (image, behind) = match policy {
            None => (Image::open(file, path)?, Vec::new()),
            Some(policy) => {
                let mut layers = Chain::of(file, path, DiskFormat::Qcow2, policy)?.layers.into_iter();
                let Some(Layer::Qcow2(image)) = layers.next() else {
                    return Err(Error::DiskFile { path: path.to_path_buf(), fault: Fault::Magic });
                };
                (*image, layers.collect())
            }
        };
        let mut writer = Self { image, behind, freed: Vec::new() };
        writer.begin()?;
        Ok(writer)
    }

    fn begin(&mut self) -> Result<(), Error> {
        let image = &mut self.image;
        let found = image.examine(Repair::Nothing)?;
        let lagging = image.header.dirty;
        let errors = found.broken + if lagging { 0 } else { found.low } + u64::from(image.header.corrupt);
        if errors > 0 {
            let first = found.lines.into_iter().next().unwrap_or_default();
            return Err(image.refuse(Fault::Inconsistent { errors, first }));
        }
        image.set_dirty(true)?;
        if found.leaks + found.low > 0 {
            image.examine(if lagging { Repair::Counts } else { Repair::Leaks })?;
        }
        Ok(())
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.image.header.size
    }

    /// Makes everything last, and says in the file that it is in order.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> Result<(), Error> {
        self.settle()?;
        self.image.sync()?;
        self.image.set_dirty(false)
    }

    /// Reads bytes of the disk.
    ///
    /// # Errors
    /// They are not inside of it, or it cannot be read.
    pub fn read_at(&mut self, buffer: &mut [u8], at: u64) -> Result<(), Error> {
        self.expect_inside(at, buffer.len() as u64)?;
        read_image(&mut self.image, &mut self.behind, buffer, at)
    }

    /// Writes bytes of the disk.
    ///
    /// # Errors
    /// They are not inside of it, or it cannot be written.
    pub fn write_at(&mut self, bytes: &[u8], at: u64) -> Result<(), Error> {
        self.expect_inside(at, bytes.len() as u64)?;
        let (mut rest, mut at) = (bytes, at);
        while !rest.is_empty() {
            let done = self.write_part(rest, at)?;
            (rest, at) = (rest.get(done..).unwrap_or_default(), at + done as u64);
        }
        if self.freed.len() > FREED_AT_ONCE { self.settle() } else { Ok(()) }
    }

    /// Makes bytes of the disk zero, and gives back the clusters that hold nothing else.
    ///
    /// # Errors
    /// They are not inside of it, or it cannot be written.
    pub fn discard(&mut self, at: u64, length: u64) -> Result<(), Error> {
        self.expect_inside(at, length)?;
        let (cluster, end) = (self.image.header.cluster(), at + length);
        let first = at.next_multiple_of(cluster);
        // Nothing is behind the end, so a cluster that it is in counts as whole.
        let last = if end == self.size() { end.next_multiple_of(cluster) } else { end / cluster * cluster };
        if first >= last {
            return self.write_zeros(at, length);
        }
        self.write_zeros(at, first - at)?;
        self.discard_clusters(first / cluster, last / cluster)?;
        self.write_zeros(last.min(end), end.saturating_sub(last))
    }

    /// Whether bytes of the disk are all zero.
    pub(super) fn is_zero(&mut self, at: u64, length: u64) -> Result<bool, Error> {
        let mut buffer = vec![0; AT_ONCE.min(usize::try_from(length).unwrap_or(AT_ONCE))];
        let mut done = 0;
        while done < length {
            let (mapping, run) = self.image.map(at + done)?;
            let run = run.min(length - done);
            let nothing = match mapping {
                super::Mapping::Zero => true,
                super::Mapping::Absent => !self.shows_behind(at + done),
                _ => false,
            };
            if nothing {
                done += run;
                continue;
            }
            let piece = usize::try_from(run).unwrap_or(AT_ONCE).min(buffer.len());
            let part = buffer.get_mut(..piece).unwrap_or_default();
            read_image(&mut self.image, &mut self.behind, part, at + done)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            done += piece as u64;
        }
        Ok(true)
    }

    /// Zeros as data, where something else is.
    pub(super) fn write_zeros(&mut self, at: u64, length: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(AT_ONCE as u64);
            if !self.is_zero(at + done, piece)? {
                self.write_at(&vec![0; usize::try_from(piece).unwrap_or(0)], at + done)?;
            }
            done += piece;
        }
        Ok(())
    }

    /// Whether something behind this file shows at byte `at` where this has nothing.
    pub(super) fn shows_behind(&self, at: u64) -> bool {
        self.behind.first().is_some_and(|layer| layer.size() > at)
    }

    /// Gives back what nothing points to any more, once that is on storage.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        if self.freed.is_empty() {
            return Ok(());
        }
        self.image.sync()?;
        let cluster = self.image.header.cluster();
        let mut clusters = Vec::new();
        for entry in std::mem::take(&mut self.freed) {
            let (at, length) =
                if entry & COMPRESSED == 0 { (entry & OFFSET, cluster) } else { self.image.packed(entry) };
            clusters.extend(at / cluster..=(at + length - 1) / cluster);
        }
        clusters.sort_unstable();
        self.image.release(&clusters)
    }

    fn expect_inside(&self, at: u64, length: u64) -> Result<(), Error> {
        let (size, end) = (self.size(), at.checked_add(length));
        if end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(self.image.refuse(Fault::Outside { from: at, to: end.unwrap_or(u64::MAX), size }))
    }

    /// Writes as much as one step can: to clusters that are there, or to such
    /// as are not and follow each other. Returns how many bytes that were.
    fn write_part(&mut self, bytes: &[u8], at: u64) -> Result<usize, Error> {
        let cluster = self.image.header.cluster();
        let entries = self.image.header.l2_entries();
        let (first, within) = (at / cluster, at % cluster);
        let table = self.table(first / entries)?;
        let index = first % entries;
        let entry = self.entry(table, index)?;
        let own = |entry: u64| entry & OFFSET != 0 && entry & (COMPRESSED | ZERO) == 0;
        if own(entry) {
            if entry & COPIED == 0 {
                let rule = "its cluster is not its own";
                return Err(self.image.refuse(Fault::pointer("a second-level table", index, entry, rule)));
            }
            let piece = usize::try_from(cluster - within).unwrap_or(usize::MAX).min(bytes.len());
            let part = bytes.get(..piece).unwrap_or_default();
            let written = self.image.file.write_all_at(part, (entry & OFFSET) + within);
            written.map_err(Error::io("write disk", &self.image.path))?;
            return Ok(piece);
        }
        // Those that follow and are not there either.
        let most = (within + bytes.len() as u64).div_ceil(cluster).min(entries - index);
        let most = most.min((AT_ONCE as u64 / cluster).max(1));
        let mut old = vec![entry];
        while (old.len() as u64) < most {
            let next = self.entry(table, index + old.len() as u64)?;
            if own(next) {
                break;
            }
            old.push(next);
        }
        let (start, taken) = self.image.take(old.len() as u64)?;
        old.truncate(usize::try_from(taken).unwrap_or(0));
        let mut data = vec![0; usize::try_from(taken * cluster).unwrap_or(0)];
        let from = usize::try_from(within).unwrap_or(usize::MAX);
        let piece = data.len().saturating_sub(from).min(bytes.len());
        self.fill_edges(&mut data, first * cluster, from, piece)?;
        if let (Some(to), Some(part)) = (data.get_mut(from..from + piece), bytes.get(..piece)) {
            to.copy_from_slice(part);
        }
        let written = self.image.file.write_all_at(&data, start * cluster);
        written.map_err(Error::io("write disk", &self.image.path))?;
        self.image.sync()?;
        let new: Vec<u8> = (start..start + taken).flat_map(|at| ((at * cluster) | COPIED).to_be_bytes()).collect();
        self.image.put_entries(table, index, &new)?;
        self.freed.extend(old.into_iter().filter(|entry| entry & (OFFSET | COMPRESSED) != 0));
        Ok(piece)
    }

    /// What the disk has in new clusters before and behind what is written.
    fn fill_edges(&mut self, data: &mut [u8], at: u64, from: usize, length: usize) -> Result<(), Error> {
        let cluster = usize::try_from(self.image.header.cluster()).unwrap_or(usize::MAX);
        let (end, size) = (from + length, self.size());
        let mut edges = [(0, from), (end, data.len())];
        // Whole clusters are overwritten: only the first and the last have more.
        edges[1].1 = edges[1].1.min(end.next_multiple_of(cluster));
        for (from, to) in edges {
            let to = to.min(usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX));
            if let Some(part) = data.get_mut(from..to.max(from)) {
                read_image(&mut self.image, &mut self.behind, part, at + from as u64)?;
            }
        }
        Ok(())
    }

    /// The second-level table `index`, made if there is none.
    fn table(&mut self, index: u64) -> Result<u64, Error> {
        let at = self.image.header.l1_offset + index * 8;
        if let Some(table) = self.image.l2_table(index)? {
            return Ok(table);
        }
        let (taken, _) = self.image.take(1)?;
        let table = taken * self.image.header.cluster();
        self.image.put_clusters(table, &vec![0; usize::try_from(self.image.header.cluster()).unwrap_or(0)])?;
        self.image.sync()?;
        self.image.put(at, &(table | COPIED).to_be_bytes())?;
        Ok(table)
    }

    fn entry(&mut self, table: u64, index: u64) -> Result<u64, Error> {
        let image = &mut self.image;
        let entry = image.tables.get(&image.file, table, index).map_err(Error::io("read disk", &image.path))?;
        image.mapping_of(entry, table, index).map_err(|fault| image.refuse(fault))?;
        Ok(entry)
    }

    /// As [`Writer::discard`], for the clusters `from` up to `to` of the disk.
    fn discard_clusters(&mut self, from: u64, to: u64) -> Result<(), Error> {
        let (cluster, entries) = (self.image.header.cluster(), self.image.header.l2_entries());
        let mut first = from;
        while first < to {
            let end = to.min((first / entries + 1) * entries);
            let shows = self.shows_behind(first * cluster);
            let zero = if shows { self.image.zero_entry() } else { 0 };
            if shows && zero == 0 {
                // Version 2 has no entry that hides what is behind.
                let bytes = (end * cluster).min(self.size()) - first * cluster;
                self.write_zeros(first * cluster, bytes)?;
            } else if shows || self.image.l2_table(first / entries)?.is_some() {
                let table = self.table(first / entries)?;
                let mut old = Vec::new();
                for index in first % entries..first % entries + (end - first) {
                    old.push(self.entry(table, index)?);
                }
                if old.iter().any(|entry| *entry != zero) {
                    let new: Vec<u8> = old.iter().flat_map(|_| zero.to_be_bytes()).collect();
                    self.image.put_entries(table, first % entries, &new)?;
                    self.freed.extend(old.into_iter().filter(|entry| entry & (OFFSET | COMPRESSED) != 0));
                }
                if self.freed.len() > FREED_AT_ONCE {
                    self.settle()?;
                }
            }
            first = end;
        }
        Ok(())
    }
}

impl Image {
    /// Writes entries of a second-level table, which is one cluster.
    fn put_entries(&mut self, table: u64, index: u64, entries: &[u8]) -> Result<(), Error> {
        self.put(table + index * 8, entries)
    }
}
