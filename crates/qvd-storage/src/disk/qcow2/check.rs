//! Whether a qcow2 file agrees with itself: every cluster that something
//! points to is counted as often as it is pointed to, and no table shares its own.
//!
//! Memory is bounded whatever the file claims: counts are compared a window of
//! the file at a time, and what is found is kept for the first few.

use std::{fs::File, path::Path};

use qvd_core::Bytes;

use super::{
    Fault, Image, Mapping,
    counts::Holes,
    image::{COPIED, OFFSET, ZERO},
};
use crate::{
    Error,
    disk::{DiskReport, lock},
};

/// Clusters that are counted at once; two bytes each.
const WINDOW: u64 = 1 << 25;
/// Most clusters of a file that is looked at: 128 TiB of 64 KiB each.
const CLUSTERS_MAX: u64 = 1 << 31;
/// How many findings are told in words.
const TOLD: usize = 16;
/// The bit of a cluster that holds a table; the others are how often it is used.
const TABLE: u16 = 1 << 15;

/// What a check may put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Repair {
    /// Nothing: the file is only read.
    #[default]
    Nothing,
    /// Clusters that are counted and not used are given back.
    Leaks,
    /// Counts that are too low are raised too: what a program leaves that was
    /// ended while it wrote, and had put off counting.
    Counts,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Pointers that cannot be right, tables that share their clusters.
    pub(super) broken: u64,
    /// Clusters that are used more often than counted.
    pub(super) low: u64,
    /// Clusters that are counted more often than used.
    pub(super) leaks: u64,
    pub(super) lines: Vec<String>,
}

impl Findings {
    fn tell(&mut self, line: String) {
        if self.lines.len() < TOLD {
            self.lines.push(line);
        }
    }

    fn broken(&mut self, line: String) {
        self.broken += 1;
        self.tell(line);
    }
}

/// Looks at a file, those behind it left alone, and puts right what it may.
/// The report says what is left to be found, and its lines what was.
///
/// # Errors
/// It cannot be read; [`Error::DiskFile`] when it has parts that are not
/// understood, [`Error::DiskFileBusy`] while a virtual machine has it.
pub fn check(path: &Path, repair: Repair) -> Result<DiskReport, Error> {
    let writes = repair != Repair::Nothing;
    let file = File::options().read(true).write(writes).open(path).map_err(Error::io("check disk", path))?;
    let free = if writes { lock::claim(&file) } else { lock::in_use(&file).map(|used| !used) };
    if !free.map_err(Error::io("look who uses", path))? {
        return Err(Error::DiskFileBusy(path.to_path_buf()));
    }
    let mut image = Image::open(file, path)?;
    let mut found = image.examine(Repair::Nothing)?;
    let wanted = found.leaks > 0 || (repair == Repair::Counts && (found.low > 0 || image.header.dirty));
    if writes && wanted && found.broken == 0 && (found.low == 0 || repair == Repair::Counts) {
        image.set_dirty(true)?;
        image.examine(repair)?;
        image.sync()?;
        image.set_dirty(false)?;
        let lines = found.lines;
        found = image.examine(Repair::Nothing)?;
        found.lines.splice(0..0, lines);
    }
    Ok(image.report(found))
}

impl Image {
    pub(super) fn report(&self, found: Findings) -> DiskReport {
        DiskReport {
            size: Bytes::new(self.header.size),
            used: Bytes::new(0),
            errors: found.broken + found.low + u64::from(self.header.corrupt),
            leaks: found.leaks,
            findings: found.lines,
        }
    }

    /// Compares all that points somewhere with the counts, and puts right what
    /// `repair` allows, unless a pointer is wrong.
    pub(super) fn examine(&mut self, repair: Repair) -> Result<Findings, Error> {
        if self.header.snapshots > 0 {
            return Err(self.unsupported("snapshots inside", "nb_snapshots at byte 60"));
        }
        if self.header.bitmaps {
            return Err(self.unsupported("bitmaps of changed blocks", "extension 0x23852875"));
        }
        let clusters = self.clusters();
        if clusters > CLUSTERS_MAX {
            return Err(self.refuse(Fault::Limit(format!("{clusters} clusters are too many to be looked at"))));
        }
        let mut found = Findings::default();
        if self.header.corrupt {
            found.tell("a program found it damaged, and said so in its header".to_owned());
        }
        let tables = self.second_level(&mut found)?;
        let mut from = 0;
        while from < clusters {
            let to = clusters.min(from + WINDOW);
            let mut window = Window { from, seen: vec![0; usize::try_from(to - from).unwrap_or(0)] };
            self.see(&tables, &mut window, (from == 0).then_some(&mut found))?;
            if found.broken > 0 {
                // With such a pointer, counts say nothing.
                return Ok(found);
            }
            self.compare(&window, repair, &mut found)?;
            from = to;
        }
        Ok(found)
    }

    fn unsupported(&self, what: &str, place: &'static str) -> Error {
        let consequence = "is for QEMU's own tools to look at";
        self.refuse(Fault::Feature { what: what.to_owned(), place, consequence })
    }

    /// Where second-level tables are, each once, with faults told.
    fn second_level(&mut self, found: &mut Findings) -> Result<Vec<u64>, Error> {
        let mut tables = Vec::new();
        for index in 0..u64::from(self.header.l1_entries) {
            match self.l1_entry(index)? {
                Ok(Some(offset)) => tables.push(offset),
                Ok(None) => {}
                Err(fault) => found.broken(fault.to_string()),
            }
        }
        tables.sort_unstable();
        let all = tables.len();
        tables.dedup();
        if tables.len() < all {
            let twice = all - tables.len();
            found.broken(format!("{twice} entries of the first-level table point to a table that another has"));
        }
        Ok(tables)
    }

    fn l1_entry(&mut self, index: u64) -> Result<Result<Option<u64>, Fault>, Error> {
        let entry = self.tables.get(&self.file, self.header.l1_offset, index);
        Ok(self.l2_offset(entry.map_err(Error::io("read disk", &self.path))?, index))
    }

    /// Notes what points into a window; the first time, what is wrong with it.
    fn see(&mut self, tables: &[u64], window: &mut Window, mut found: Option<&mut Findings>) -> Result<(), Error> {
        let cluster = self.header.cluster();
        window.add(0, 1, true);
        let l1_clusters = (u64::from(self.header.l1_entries) * 8).div_ceil(cluster);
        window.add(self.header.l1_offset / cluster, l1_clusters, true);
        window.add(self.header.reftable_offset / cluster, self.header.reftable_clusters.into(), true);
        for index in 0..self.count_blocks() {
            match self.count_block(index) {
                Ok(Some(block)) => window.add(block / cluster, 1, true),
                Ok(None) => {}
                Err(Error::DiskFile { fault, .. }) => {
                    if let Some(found) = &mut found {
                        found.broken(fault.to_string());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if found.as_ref().is_some_and(|found| found.broken > 0) {
            return Ok(());
        }
        for index in 0..u64::from(self.header.l1_entries) {
            if let Ok(Some(table)) = self.l1_entry(index)? {
                window.add(table / cluster, 1, true);
                if let Some(found) = &mut found {
                    let entry = self.tables.get(&self.file, self.header.l1_offset, index);
                    let entry = entry.map_err(Error::io("read disk", &self.path))?;
                    self.expect_mark(entry, &format!("entry {index} of the first-level table"), found)?;
                }
            }
        }
        for table in tables {
            let bytes = self.tables.cluster_at(&self.file, *table).map_err(Error::io("read disk", &self.path))?;
            let entries: Vec<u64> =
                bytes.chunks_exact(8).map(|e| e.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).collect();
            for (index, entry) in (0_u64..).zip(entries).filter(|(_, entry)| *entry != 0) {
                match self.mapping_of(entry, *table, index) {
                    Ok(Mapping::Compressed(_)) => {
                        let (at, length) = self.packed(entry);
                        window.add(at / cluster, (at + length - 1) / cluster - at / cluster + 1, false);
                    }
                    Ok(_) if entry & OFFSET != 0 => {
                        window.add((entry & OFFSET) / cluster, 1, false);
                        if let Some(found) = &mut found {
                            let what = format!("entry {index} of the second-level table at byte {table:#x}");
                            self.expect_mark(entry, &what, found)?;
                        }
                    }
                    Ok(_) => {}
                    Err(fault) => {
                        if let Some(found) = &mut found {
                            found.broken(fault.to_string());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// An entry is marked exactly when its cluster is counted once. With counts
    /// that were put off, that says nothing.
    fn expect_mark(&mut self, entry: u64, what: &str, found: &mut Findings) -> Result<(), Error> {
        if self.header.dirty {
            return Ok(());
        }
        let count = self.count((entry & OFFSET) / self.header.cluster())?;
        if (count == 1) != (entry & COPIED != 0) && count > 0 {
            found.broken(format!("{what} is {entry:#018x}, but its cluster has the count {count}"));
        }
        Ok(())
    }

    fn compare(&mut self, window: &Window, repair: Repair, found: &mut Findings) -> Result<(), Error> {
        let mut holes = Holes::default();
        for (cluster, seen) in (window.from..).zip(&window.seen) {
            let (uses, table) = (u64::from(seen & !TABLE), seen & TABLE != 0);
            let at = cluster * self.header.cluster();
            if table && uses > 1 {
                found.broken(format!(
                    "cluster {cluster} (byte {at:#x} of the file) holds a table, and is used for more"
                ));
                continue;
            }
            let count = self.count(cluster)?;
            if count == uses {
                continue;
            }
            found.tell(Fault::References { cluster, at, found: uses, count }.to_string());
            let may = if uses > count {
                found.low += 1;
                repair == Repair::Counts
            } else {
                found.leaks += 1;
                repair != Repair::Nothing
            };
            if may {
                self.set_counts(cluster, 1, uses)?;
                if uses == 0 {
                    holes.add(self, cluster);
                }
            }
        }
        holes.end(self);
        Ok(())
    }

    /// Says in the header that counts may be wrong, or that they are right
    /// again: whoever opens the file to write looks at them first. Version 2 has no such
    /// place; there, what an end in between leaves is lost space.
    pub(super) fn set_dirty(&mut self, dirty: bool) -> Result<(), Error> {
        if self.header.version > 2 && self.header.dirty != dirty {
            let mut features = [0; 8];
            super::read_padded(&self.file, &mut features, 72).map_err(Error::io("read disk", &self.path))?;
            let [.., last] = &mut features;
            *last = *last & !1 | u8::from(dirty);
            self.put(72, &features)?;
            // Bits of what others keep up to date beside the disk, and we do not.
            self.put(88, &[0; 8])?;
            self.sync()?;
            self.header.dirty = dirty;
        }
        Ok(())
    }

    /// What a new entry for zeros is.
    pub(super) const fn zero_entry(&self) -> u64 {
        if self.header.version > 2 { ZERO } else { 0 }
    }
}

/// How often clusters of a part of the file are pointed to.
struct Window {
    from: u64,
    seen: Vec<u16>,
}

impl Window {
    fn add(&mut self, first: u64, number: u64, table: bool) {
        let end = first.saturating_add(number);
        for cluster in first.max(self.from)..end {
            let Some(seen) = usize::try_from(cluster - self.from).ok().and_then(|at| self.seen.get_mut(at)) else {
                return;
            };
            let uses = (*seen & !TABLE).saturating_add(1).min(!TABLE);
            *seen = *seen & TABLE | uses | if table { TABLE } else { 0 };
        }
    }
}
